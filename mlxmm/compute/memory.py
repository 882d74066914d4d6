"""Memory of the device: how much MLX keeps and pins of it, and a warning before it runs out.

On Metal, MLX keeps the memory of freed arrays for new ones, by default up to nearly all there is: a machine of 16 GB
swaps before it gives any back (mlx#3129). So what is kept is bounded, and given back after validation and captioning,
whose arrays have other shapes than those of training.
"""

import contextlib
import os
from collections.abc import Iterator

import mlx.core as mx

from mlxmm.compute import linux_malloc
from mlxmm.errors import warn

GIB = 2**30
KEPT_SHARE, WIRED_SHARE = 1 / 8, 1 / 2  # of the working set; a machine that wired three quarters crashed (mlx-lm#883)
WARN_SHARE = 0.8


def working_set() -> int | None:
    """The bytes that the device works with at full speed: what Metal recommends, all of a CUDA card; None on a CPU."""
    if mx.default_device() == mx.cpu:
        return None
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info["total_memory"])


def physical_memory() -> int:
    """The bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back() -> None:
    """Give back the memory of freed arrays: those that come next have other shapes."""
    mx.clear_cache()
    linux_malloc.trim()


@contextlib.contextmanager
def limited(cache_gib: float | None, wired_gib: float | None) -> Iterator[None]:
    """Within the block, MLX keeps at most `cache_gib` GiB of freed memory, and pins at most `wired_gib` GiB.

    None: on Metal, the shares above; elsewhere MLX's own limits.
    """
    if mx.metal.is_available():
        cache_gib = KEPT_SHARE * working_set() / GIB if cache_gib is None else cache_gib
        wired_gib = WIRED_SHARE * working_set() / GIB if wired_gib is None else wired_gib
    before = [(set_limit, set_limit(int(gib * GIB))) for set_limit, gib in _limits(cache_gib, wired_gib)]
    try:
        yield
    finally:
        for set_limit, limit in before:
            set_limit(limit)


def _limits(cache_gib: float | None, wired_gib: float | None) -> list:
    pairs = (mx.set_cache_limit, cache_gib), (mx.set_wired_limit, wired_gib)
    return [(set_limit, gib) for set_limit, gib in pairs if gib is not None]


class PeakWarning:
    """Warns, once, where the peak of memory is past four fifths of the working set."""

    def __init__(self):
        self._limit = working_set()

    def check(self) -> None:
        """Compare the peak with the limit; costs a microsecond."""
        if self._limit is None or (peak := mx.get_peak_memory()) <= WARN_SHARE * self._limit:
            return
        warn(
            f"the peak of memory, {peak / GIB:.1f} GiB, is near the {self._limit / GIB:.1f} GiB that this device works "
            "with at full speed. To use less: a smaller --batch-size with --trainer.accumulate-grad-batches, and "
            "--trainer.gradient-checkpointing",
        )
        self._limit = None
