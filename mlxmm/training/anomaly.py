"""Checks for numbers that are not finite, by the name of the part that produced them."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm.compute.layer_calls import replaced_calls
from mlxmm.errors import warn

LOSSES = ("train/loss", "val/loss")
GROWTH = 10  # times the first loss, or 1 if that is less


class AnomalyError(ArithmeticError):
    """A value that is not finite; the message names the part that produced it."""


@contextlib.contextmanager
def watched_outputs(module: nn.Module) -> Iterator[None]:
    """Raise `AnomalyError` with the name of the first part whose output is not finite. For uncompiled steps."""

    def wrap(name, call):
        def run(self, *args, **kwargs):
            outputs = call(self, *args, **kwargs)
            assert_finite(outputs, f"the output of {name or type(self).__name__}")
            return outputs

        return run

    with replaced_calls({name: part for name, part in module.named_modules() if part is not module}, wrap):
        yield


def assert_finite(tree, what: str) -> None:
    """Raise `AnomalyError` if `tree` holds a number that is not finite; `what` describes the tree in the message."""
    for name, array in tree_flatten(tree):
        if isinstance(array, mx.array) and not mx.isfinite(array).all().item():
            raise AnomalyError(f"{what}{f' ({name})' if name else ''} is not finite")


class DivergenceWarning:
    """Warns, once a run, of a loss that is not finite, or that has grown to ten times the first one logged."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}  # the loss logged first, and after how many updates
        self._told = False

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Look at the losses among what is logged after `step` updates."""
        for name in [] if self._told else [name for name in LOSSES if name in metrics]:
            loss = metrics[name]
            first, began = self._first.setdefault(name, (loss, step))
            if not math.isfinite(loss) or loss > first + GROWTH * max(1.0, abs(first)):
                before = f" (it was {first:.3g} after {began})" if began < step else ""
                told = f"{name} is {loss:.3g} after {step} updates: training diverges{before}. Lower the learning rate"
                warn(f"{told}, or look for labels out of range; detect_anomaly=True finds the first part with a NaN")
                self._told = True
                return
