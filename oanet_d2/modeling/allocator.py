"""
Memory that is freed within a call is used again within it, not given back to the kernel in between.
"""

import ctypes
from contextlib import contextmanager
from functools import lru_cache

__all__ = ["memory_used_again"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# The most that a block may have and still be kept when it is freed, unless glibc is told otherwise.
# It comes to these by itself once a block of that size was freed, so they are what is left behind.
_LARGEST_KEPT = 2**25
_AS_BEFORE = (
    (_M_MMAP_MAX, 65536),
    (_M_MMAP_THRESHOLD, _LARGEST_KEPT),
    (_M_TRIM_THRESHOLD, 2 * _LARGEST_KEPT),
)
_KEEP = (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)


@lru_cache(maxsize=1)
def _malloc():
    """
    The C library, if its allocator is glibc's.
    """
    library = ctypes.CDLL(None)
    has_all = all(hasattr(library, x) for x in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return library if has_all else None


@contextmanager
def memory_used_again():
    """
    glibc gives blocks of 32 MiB and more back to the kernel when they are freed, and the kernel clears
    the next one, a page at a time. A network frees one such map after the other. Within this context
    they are kept; what is free at its end is given back. It holds for the whole process, whose other
    threads may notice nothing but that. Without glibc it does nothing.
    """
    library = _malloc()
    if library is None:
        yield
        return
    for option in _KEEP:
        library.mallopt(*option)
    try:
        yield
    finally:
        for option in _AS_BEFORE:
            library.mallopt(*option)
        library.malloc_trim(0)
