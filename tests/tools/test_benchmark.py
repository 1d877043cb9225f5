import multiprocessing
import sys

import benchmark
import pytest
import torch


def hold():
    a = torch.ones(10 * 2**20)  # 40 MiB
    b = a + 1  # 80 at once
    del a
    return b, torch.ones(5 * 2**20)  # 60


def test_memory_is_what_is_held_at_once():
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # nothing is freed there before
        pool.apply(hold)
        assert 79 <= pool.apply(benchmark.mebibytes_of, (hold, "cpu")) <= 90


def test_both_sides_do_the_same_work(monkeypatch):
    ours, theirs = benchmark.paste_and_combine((96, 440), "cpu")
    (seg, segments), (expected, expected_segments) = ours(), theirs()
    assert torch.equal(seg, expected) and segments == expected_segments and len(segments) > 1
    ours, theirs = benchmark.semantic_labels("cpu")
    assert (ours() == theirs()).double().mean() > 0.9999

    monkeypatch.setattr(benchmark, "IMAGE_SIZE", (416, 448))
    monkeypatch.setattr(benchmark, "COCO", benchmark.DEMO)
    monkeypatch.setattr(benchmark, "NUM_THINGS", 8)
    stuff = ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SRM_HEAD.PAIRS.EVIDENCE", "()"]
    for side in benchmark.inference(stuff, benchmark.PANOPTIC_FPN, 20, "cpu"):
        (result,) = side()
        assert 2 <= sum(x["isthing"] for x in result["panoptic_seg"][1]) <= 20
    # Batches in mixed precision, as on a GPU.
    sides = benchmark.inference(
        stuff, benchmark.PANOPTIC_FPN, 20, "cpu", size=(96, 160), batch=2, dtype=torch.bfloat16
    )
    for side in sides:
        results = side()
        assert [x["panoptic_seg"][0].shape for x in results] == [(96, 160)] * 2


@pytest.mark.parametrize("phase, amp", [("network", True), ("ranking", False)])
def test_steps_of_the_network_on_coco(monkeypatch, tmp_path, phase, amp):
    """With a small network in place of the R-50, and as many classes as COCO has."""
    config = tmp_path / "small.yaml"
    config.write_text(f'_BASE_: "{benchmark.ROOT / benchmark.DEMO}"\nSOLVER: {{MAX_ITER: 1}}\n')
    monkeypatch.setattr(benchmark, "NUM_STUFF", 20)
    ours, theirs = benchmark.training_step(phase, "cpu", str(config), 64, amp)
    (trainer,) = ours.args
    heads, losses = trainer.model.roi_heads, []
    assert heads.num_classes == 80 and len(heads.blobs) == 100
    trainer.model.register_forward_hook(lambda model, inputs, found: losses.append(found))
    ours(), theirs()
    assert ("loss_srm_pairs" in losses[0]) == (phase == "ranking")
    assert ("loss_mask" in losses[0]) == (phase == "network")


def test_how_many_workers_feed_a_gpu():
    cells = {"mapper": ["", "200.0"], "step_network_AMP": ["AMP", "25.0"], "inference": ["", "9.0"]}
    assert benchmark.workers_needed(cells) == (
        "One worker of the data loader reads 40.0 images a second; AMP: 80.0 images a second, 2 workers."
    )


def test_a_row_that_fails_loses_no_other(monkeypatch, tmp_path):
    def measured(function, name, device):
        if name == "mapper":
            raise MemoryError
        return [name, *"123456"]

    page = tmp_path / "page.md"
    page.write_text("<!-- tools/benchmark.py --device cpu fills this in --><!-- end -->")
    monkeypatch.setattr(benchmark, "in_a_process", measured)
    arguments = ["--rows", "inference", "mapper", "ranking", "--update", str(page)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit, match=": mapper$"):
        benchmark.main()
    assert [x.split()[1] for x in page.read_text().splitlines()[-4:-2]] == ["inference", "ranking"]
