"""Checks for numbers that are not finite, by the name of the part that produced them."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm.compute.layer_calls import replaced_calls


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
