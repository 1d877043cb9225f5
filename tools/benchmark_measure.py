"""
How tools/benchmark.py measures: times in turns, peak memory as the kernel saw it, and what the
machine can do at best.
"""

import ctypes
import gc
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable, Dict, List, Optional

import torch

MIB = 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")


def times_in_turns(variants: Dict[str, Callable], repeats: int) -> Dict[str, List[float]]:
    """
    Call every variant in turn, `repeats` times. They have been called before.

    Returns:
        seconds of every call, by variant.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            gc.collect()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(function: Callable, repeats: int = 3) -> Optional[int]:
    """
    Returns:
        bytes by which a call raises this process's memory at its peak, above what there is before
        it: inputs, weights, and what a first call, which has been made, has set up. The median of
        several calls, as where free memory lies is chance. None where the system does not tell (not
        Linux).
    """
    if not CLEAR_REFS.exists():
        return None
    return statistics.median_low([_peak_of_a_call(function) for _ in range(repeats)])


def _peak_of_a_call(function: Callable) -> int:
    gc.collect()
    _give_back()
    _reset_peak()
    before = _status("VmRSS")
    result = function()
    del result
    return max(_status("VmHWM") - before, 0)


def _give_back() -> None:
    """
    Free memory that the C library keeps would serve the next call, which would look cheaper.
    """
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    CLEAR_REFS.write_text("5")


def _status(field: str) -> int:
    """
    A field of /proc/self/status, in bytes.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def bytes_per_second() -> float:
    """
    Memory bandwidth: bytes read and written by copying an array that no cache holds.
    """
    source = torch.ones(64 * MIB)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / _best(lambda: target.copy_(source))


def flops_per_second() -> float:
    """
    Floating-point operations of a matrix product, in single precision.
    """
    size = 1536
    a, b = torch.rand(2, size, size)
    return 2 * size**3 / _best(lambda: a @ b)


def _best(function: Callable, repeats: int = 7) -> float:
    function()
    return min(t for ts in times_in_turns({"": function}, repeats).values() for t in ts)
