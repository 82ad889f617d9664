"""The C library's allocator, told to keep what it has.

Training frees and takes the same large blocks in every step. glibc gives blocks of that size back to the system and
asks for them again, and every page of them must then be cleared anew: a large part of the time of a step on a CPU.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h
_NEVER, _STEP = 2**31 - 1, 256 << 20  # bytes


def keep_memory() -> bool:
    """Ask for it; whether the allocator is one that can."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(
        mallopt(option, value) for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _STEP))
    )
