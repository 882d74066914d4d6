"""Temporary wrappers around layer calls: for gradient checkpointing, sharding, and checks of outputs."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm.compute.named_arrays import put_arrays


@contextlib.contextmanager
def replaced_calls(parts: Mapping[str, nn.Module], wrap: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Within the block, calling any of `parts` runs `wrap(name, original_call)` instead."""
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
def replaced_classes(parts: Iterable[nn.Module], wrap: Callable[[type], type]) -> Iterator[None]:
    """Within the block, each of `parts` is of the class `wrap(its own)`, which is a subclass."""
    own = [(part, type(part)) for part in {id(part): part for part in parts}.values()]
    wrapped = {kind: wrap(kind) for _, kind in own}
    for part, kind in own:
        part.__class__ = wrapped[kind]
    try:
        yield
    finally:
        for part, kind in own:
            part.__class__ = kind


def repeated_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The entries of all lists named `layers`, by their dotted names."""
    return {name: part for name, part in module.named_modules() if re.search(r"(^|\.)layers\.\d+$", name)}


def call_with_written(module: nn.Module, call: Callable[[], Any]) -> tuple[Any, dict[str, mx.array]]:
    """What `call()` returns, and the arrays that it wrote into `module`, by dotted names: running statistics."""
    before = dict(tree_flatten(module.parameters()))
    outputs = call()
    now = tree_flatten(module.parameters())
    return outputs, {name: mx.stop_gradient(array) for name, array in now if array is not before.get(name)}


@contextlib.contextmanager
def replaced_parameters(module: nn.Module, everything: dict, parameters: dict) -> Iterator[None]:
    """Within the block, `module` has the arrays of `everything`, overridden by those of `parameters`.

    For recomputing a layer in the backward pass: by then the module may hold other arrays, or arrays of another dtype
    (mixed precision has restored the float32 weights). Its own arrays are restored at the end.
    """
    own = module.parameters()
    put_arrays(module, everything)
    put_arrays(module, parameters)
    try:
        yield
    finally:
        put_arrays(module, own)
