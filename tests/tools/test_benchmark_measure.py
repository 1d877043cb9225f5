import benchmark_measure
import pytest
import torch

MIB = 2**20


@pytest.mark.skipif(not benchmark_measure.CLEAR_REFS.exists(), reason="only Linux tells")
def test_peak_memory_is_what_is_held_at_once():
    def step():
        a = torch.ones(10 * MIB)  # 40 MiB
        b = a + 1  # 80 at once
        del a
        return b, torch.ones(5 * MIB)  # 60

    step()  # as it has to be
    assert 79 * MIB <= benchmark_measure.peak_memory(step) <= 90 * MIB
    # however much was needed before
    assert benchmark_measure.peak_memory(lambda: torch.ones(5 * MIB)) <= 25 * MIB


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
