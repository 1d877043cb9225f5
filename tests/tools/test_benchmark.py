import multiprocessing

import benchmark
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
