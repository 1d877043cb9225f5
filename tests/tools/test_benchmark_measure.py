import subprocess
import sys
from pathlib import Path

import benchmark_measure
import pytest

TOOLS = Path(benchmark_measure.__file__).parent


# In a process of its own, as benchmark.py measures: others have freed memory to fall back on.
HELD_AT_ONCE = """
import torch
from benchmark_measure import peak_memory

MIB = 2**20

def step():
    a = torch.ones(10 * MIB)  # 40 MiB
    b = a + 1  # 80 at once
    del a
    return b, torch.ones(5 * MIB)  # 60

step()  # as it has to be
first = peak_memory(step)
assert 79 * MIB <= first <= 90 * MIB, first / MIB
# however much was needed before
second = peak_memory(lambda: torch.ones(5 * MIB))
assert 19 * MIB <= second <= 25 * MIB, second / MIB
"""


@pytest.mark.skipif(not benchmark_measure.CLEAR_REFS.exists(), reason="only Linux tells")
def test_peak_memory_is_what_is_held_at_once():
    subprocess.run([sys.executable, "-c", HELD_AT_ONCE], cwd=TOOLS, check=True)


def test_without_the_kernels_help_memory_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_measure, "CLEAR_REFS", tmp_path / "clear_refs")
    assert benchmark_measure.peak_memory(lambda: pytest.fail("called for nothing")) is None


def test_variants_take_turns():
    called = []
    variants = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = benchmark_measure.times_in_turns(variants, 3)
    assert called == ["a", "b"] * 3
    assert {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3}
    assert all(t >= 0 for ts in seconds.values() for t in ts)
