"""Dispatch: the device computes an update while Python goes on to hooks and to the next batch."""

from collections.abc import Mapping

import mlx.core as mx

from mlxmm.distributed import collectives


class Dispatch:
    """`dispatch(metrics, state…)` has the device begin with an update, and returns.

    The update before is waited for, as two at once would take the memory of two: it is the one that Python is ahead
    by. With several processes the update itself is waited for: they communicate within it, and the calls that they
    make after it must not come in between.
    """

    def __init__(self) -> None:
        self._newest: Mapping[str, mx.array] | None = None  # metrics of the update that the device may still compute

    def __call__(self, metrics: Mapping[str, mx.array], *state) -> None:
        if collectives.world_size() > 1:
            mx.eval(metrics, *state)
            return
        mx.eval(self._newest)
        mx.async_eval(metrics, *state)
        self._newest = metrics
