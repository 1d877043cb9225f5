import subprocess
import sys

import benchmark
import pytest
import torch

# In a process of its own, as the script measures: memory that others have freed would serve the call.
HELD_AT_ONCE = """
import benchmark, torch
def call():
    a = torch.ones(10 * 2**20)  # 40 MiB
    b = a + 1  # 80 at once
    del a
    return b, torch.ones(5 * 2**20)  # 60
call()
print(benchmark.peak_memory(call, "cpu") / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_is_what_is_held_at_once():
    command = [sys.executable, "-c", HELD_AT_ONCE]
    folder = benchmark.ROOT / "tools"
    output = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE).stdout
    assert 79 <= float(output) <= 90


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
        assert len(result["instances"]) == 100
        assert 2 <= sum(x["isthing"] for x in result["panoptic_seg"][1]) <= 20


def test_a_training_step_leaves_the_weights():
    for side in benchmark.training_step("ranking", "cpu"):
        before = [x.clone() for x in side.args[0].parameters()]
        side()
        assert all(map(torch.equal, side.args[0].parameters(), before))
