"""What can be done to a module's layers for the length of a run: recompute them, or watch what they give."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxmm.patch_dropout import PatchDropout

DROPOUTS = {nn.Dropout: 0, nn.Dropout2d: 2, nn.Dropout3d: 3}  # and how many axes are dropped as one


class AnomalyError(ArithmeticError):
    """Something that is not finite, and where it was first seen."""


@contextlib.contextmanager
def replaced_calls(parts: Mapping[str, nn.Module], wrap: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Until the end of the block, `wrap(name, call)` stands in for the call of each of `parts`."""
    own = {id(part): (part, type(part)) for part in parts.values()}
    for name, part in parts.items():
        kind = own[id(part)][1]
        part.__class__ = type(kind.__name__, (kind,), {"__call__": wrap(name, kind.__call__)})
    try:
        yield
    finally:
        for part, kind in own.values():
            part.__class__ = kind


@contextlib.contextmanager
def recomputed_layers(module: nn.Module) -> Iterator[None]:
    """Gradient checkpointing (arXiv 1604.06174): of each entry of a list called `layers` only the input is kept
    for the backward pass, and the rest computed again, with the same dropout."""
    with replaced_calls(repeated_layers(module), _recomputed):
        yield


def repeated_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The entries of all lists called `layers`, by their dotted names."""
    return {name: part for name, part in module.named_modules() if re.search(r"(^|\.)layers\.\d+$", name)}


def _recomputed(name: str, call: Callable) -> Callable:
    def run(self, *args, **kwargs):
        def inner(trained, others, key, *args, **kwargs):
            # Those of now come in by name. Neither frozen weights nor random bits have a gradient.
            others, key = tree_map(mx.stop_gradient, (others, key))
            with replaced_parameters(self, others, trained), dropout_from(self, key):
                return call(self, *args, **kwargs)

        key = mx.random.randint(0, 2**31 - 1, (2,), dtype=mx.uint32)
        trained, args = _gradients_at_once((self.trainable_parameters(), args))
        return mx.checkpoint(inner)(trained, self.parameters(), key, *args, **kwargs)

    return run


def _gradients_at_once(tree):
    """`tree`, whose arrays all get their gradients before any of them goes further back.

    MLX may otherwise follow the inputs' gradients down to the first layer and compute those of the weights last,
    while everything that was computed again for them stays in memory.
    """
    floats = [leaf for _, leaf in tree_flatten(tree) if _is_float(leaf)]
    passed = iter(_passed_on(*floats) if floats else ())
    return tree_map(lambda leaf: next(passed) if _is_float(leaf) else leaf, tree)


def _is_float(leaf) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


@mx.custom_function
def _passed_on(*arrays):
    return arrays


@_passed_on.vjp
def _passed_on_vjp(primals, cotangents, _):
    return mx.depends(list(cotangents), list(cotangents))


@contextlib.contextmanager
def replaced_parameters(module: nn.Module, everything: dict, parameters: dict) -> Iterator[None]:
    """Until the end of the block, `module` has `everything`, and over it `parameters`.

    For a second pass: by then the module may hold other arrays, or of another type (mixed precision has put the
    float32 weights back), and it keeps its own.
    """
    own = module.parameters()
    module.update(everything)
    module.update(parameters)
    try:
        yield
    finally:
        module.update(own)


@contextlib.contextmanager
def dropout_from(module: nn.Module, key: mx.array) -> Iterator[None]:
    """Let every dropout under `module` draw from `key`, so that a second pass drops what the first one did.

    MLX's own draws from the global key, which has moved on when a layer is computed again.
    """
    keys = iter(_successors(key))

    def wrap(name, call):
        def run(self, x):
            if isinstance(self, PatchDropout):
                return call(self, x, next(keys))
            if not self.training or self._p_1 == 1:
                return x
            together = next(axes for kind, axes in DROPOUTS.items() if isinstance(self, kind))
            shape = (*x.shape[: x.ndim - 1 - together], *[1] * together, x.shape[-1])
            mask = mx.random.bernoulli(self._p_1, shape, key=next(keys))
            return (mask * x) * (1 / self._p_1)

        return run

    drops = {name: part for name, part in module.named_modules() if isinstance(part, (PatchDropout, *DROPOUTS))}
    with replaced_calls(drops, wrap):
        yield


def _successors(key: mx.array) -> Iterator[mx.array]:
    while True:
        key, drawn = mx.random.split(key)
        yield drawn


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
    """Raise `AnomalyError` where `tree` holds a number that is not finite; `what` tells of which tree it is."""
    for name, array in tree_flatten(tree):
        if isinstance(array, mx.array) and not mx.isfinite(array).all().item():
            raise AnomalyError(f"{what}{f' ({name})' if name else ''} is not finite")
