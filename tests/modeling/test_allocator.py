import subprocess
import sys

import pytest
import torch

from detectron2.modeling import build_model

from oanet_d2.modeling import allocator
from oanet_d2.modeling.allocator import memory_used_again
from oanet_d2.modeling.execution import LARGE, Execution

glibc = pytest.mark.skipif(allocator._malloc() is None, reason="the allocator is not glibc's")

# In a process of its own: what malloc is told holds for all of it.
FREES_MAPS = """
import resource, sys
from contextlib import nullcontext
import torch
from oanet_d2.modeling.allocator import memory_used_again

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()

def a_hundred_maps():
    for _ in range(100):
        torch.ones(2**24)  # 64 MiB

with memory_used_again() if sys.argv[1] == "True" else nullcontext():
    before = faults()
    a_hundred_maps()
    during, kept = faults() - before, resident()
print(during, kept - resident())
"""


def pages_of_maps(used_again):
    command = [sys.executable, "-c", FREES_MAPS, str(used_again)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return [int(x) for x in run.stdout.split()]


@glibc
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernel_clears_the_memory_once_and_gets_it_back():
    (without, _), (within, given_back) = map(pages_of_maps, (False, True))
    # (Pages may be huge ones, but they are the same for both.)
    assert within < without / 4  # the first few have to find a place
    assert given_back > 60 * 2**20


class Recorder:
    def __init__(self):
        self.calls = []

    def mallopt(self, *args):
        self.calls.append(args)

    def malloc_trim(self, *args):
        self.calls.append("trim")


@pytest.fixture
def malloc(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(allocator, "_malloc", lambda: recorder)
    return recorder


def test_is_undone_whatever_happens(malloc):
    with pytest.raises(RuntimeError, match="out of luck"), memory_used_again():
        malloc.calls.clear()
        raise RuntimeError("out of luck")
    assert malloc.calls == [(-4, 65536), (-3, 2**25), (-1, 2**26), "trim"]


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_malloc", lambda: None)
    with memory_used_again():
        pass


@pytest.mark.parametrize(
    "device, num_pixels, reuse, used",
    [
        ("cpu", LARGE, True, True),
        ("cpu", LARGE - 1, True, False),
        ("cpu", LARGE, False, False),
        ("cuda", LARGE, True, False),
    ],
)
def test_for_large_images_on_a_cpu(malloc, device, num_pixels, reuse, used):
    execution = Execution(reuse_memory=reuse)
    with execution.inference(torch.device(device), num_pixels):
        assert bool(malloc.calls) == used


def test_pixels_of_a_batch_count_together(tiny_cfg, monkeypatch):
    model, seen = build_model(tiny_cfg).eval(), []
    inference = Execution.inference
    monkeypatch.setattr(
        Execution, "inference", lambda self, *args: seen.append(args[1]) or inference(self, *args)
    )
    images = [torch.zeros(3, h, w, dtype=torch.uint8) for h, w in ((32, 64), (64, 64))]
    with torch.no_grad():
        model([{"image": x} for x in images])
    assert seen == [32 * 64 + 64 * 64]
