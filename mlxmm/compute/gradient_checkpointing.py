"""Gradient checkpointing (arXiv 1604.06174): layers store their inputs and are computed again in the backward pass."""

import contextlib
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxmm.compute.cores import custom_function
from mlxmm.compute.dropout import dropout_from
from mlxmm.compute.layer_calls import call_with_written, repeated_layers, replaced_calls, replaced_parameters
from mlxmm.compute.named_arrays import put_arrays, trainable_arrays


@contextlib.contextmanager
def recomputed_layers(module: nn.Module) -> Iterator[None]:
    """Within the block, each entry of a list named `layers` stores only its input for the backward pass, and computes
    the rest again there, with the same dropout."""
    with replaced_calls(repeated_layers(module), _recomputed):
        yield


def _recomputed(name: str, call: Callable) -> Callable:
    def run(self, *args, **kwargs):
        def inner(trained, others, key, *args, **kwargs):
            # Trainable weights are passed as `trained`; frozen weights and the random key need no gradient.
            others, key = tree_map(mx.stop_gradient, (others, key))
            with replaced_parameters(self, others, trained), dropout_from(self, key):
                return call_with_written(self, lambda: call(self, *args, **kwargs))

        key = mx.random.randint(0, 2**31 - 1, (2,), dtype=mx.uint32)
        trained, args = _gradients_at_once((trainable_arrays(self), args))
        outputs, written = mx.checkpoint(inner)(trained, self.parameters(), key, *args, **kwargs)
        put_arrays(self, written)
        return outputs

    return run


def _gradients_at_once(tree):
    """Backward barrier: all gradients of these arrays are computed before any propagates further.

    MLX may otherwise propagate the gradients of the inputs down to the first layer and compute those of the weights
    last, while everything that was recomputed for them stays in memory.
    """
    floats = [leaf for _, leaf in tree_flatten(tree) if _is_float(leaf)]
    passed = iter(_passed_on(*floats) if floats else ())
    return tree_map(lambda leaf: next(passed) if _is_float(leaf) else leaf, tree)


def _is_float(leaf) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


@custom_function
def _passed_on(*arrays):
    return arrays


@_passed_on.vjp
def _passed_on_vjp(primals, cotangents, _):
    return mx.depends(list(cotangents), list(cotangents))
