"""Let glibc keep the memory of freed arrays on Linux CPUs, at import. MLXMM_FAST=off leaves it as it is.

MLX's CPU backend allocates each array by malloc. glibc maps large blocks one by one and hands each back to the kernel
when it is freed, so that every update pays for page faults and zeroed pages again.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST = 32 * 2**20  # bytes of a block that comes from the heap: glibc takes no more
KEPT = 2**31 - 1  # bytes at the heap's end that are not handed back


def enable() -> bool:
    """Whether glibc took the settings; false elsewhere."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGEST) == mallopt(M_TRIM_THRESHOLD, KEPT) == 1
