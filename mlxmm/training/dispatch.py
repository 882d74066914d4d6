"""Dispatch: the device computes an update while Python goes on to hooks and to the next batch."""

import os
from collections.abc import Mapping

import mlx.core as mx

from mlxmm.distributed import collectives


class Dispatch:
    """`dispatch(metrics, state…)` has the device begin with an update, and returns.

    The update before is waited for, as two at once would take the memory of two: it is the one that Python is ahead
    by. The update itself is waited for on a lone core, which Python would share with it; and with several processes,
    which communicate within it: the calls that they make after it must not come in between. `is_ahead` says what to do
    whatever the device is.
    """

    def __init__(self, is_ahead: bool | None = None) -> None:
        self._is_ahead, self._has_cores = is_ahead, (os.cpu_count() or 1) > 1
        self._newest: Mapping[str, mx.array] | None = None  # metrics of the update that the device may still compute

    def __call__(self, metrics: Mapping[str, mx.array], *state) -> None:
        has_room = self._has_cores or mx.default_device() != mx.cpu
        is_ahead = has_room if self._is_ahead is None else self._is_ahead
        if not is_ahead or collectives.world_size() > 1:
            mx.eval(metrics, *state)
            return
        mx.eval(self._newest)
        mx.async_eval(metrics, *state)
        self._newest = metrics
