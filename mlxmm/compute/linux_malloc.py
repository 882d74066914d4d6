"""Let glibc keep the memory of freed arrays on Linux CPUs, at import. MLXMM_FAST=off leaves it as it is.

MLX's CPU backend allocates each array by malloc. glibc maps large blocks one by one and hands each back to the kernel
when it is freed, so that every update pays for page faults and zeroed pages again. So all blocks come from the heap,
which is handed back after validation and captioning, by `trim`.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)
KEPT = 2**31 - 1  # bytes at the heap's end that are not handed back

_libc: ctypes.CDLL | None = None  # once it keeps memory


def enable() -> bool:
    """Whether glibc took the settings; false elsewhere."""
    global _libc
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and libc.mallopt(M_MMAP_MAX, 0) == libc.mallopt(M_TRIM_THRESHOLD, KEPT) == 1:
        _libc = libc
    return _libc is not None


def trim() -> None:
    """Hand back what is free now."""
    if _libc is not None:
        _libc.malloc_trim(0)
