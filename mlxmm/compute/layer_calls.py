"""Temporary wrappers around layer calls: for gradient checkpointing, sharding, and checks of outputs."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping

import mlx.nn as nn


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


def repeated_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The entries of all lists named `layers`, by their dotted names."""
    return {name: part for name, part in module.named_modules() if re.search(r"(^|\.)layers\.\d+$", name)}


@contextlib.contextmanager
def replaced_parameters(module: nn.Module, everything: dict, parameters: dict) -> Iterator[None]:
    """Within the block, `module` has the arrays of `everything`, overridden by those of `parameters`.

    For recomputing a layer in the backward pass: by then the module may hold other arrays, or arrays of another dtype
    (mixed precision has restored the float32 weights). Its own arrays are restored at the end.
    """
    own = module.parameters()
    module.update(everything)
    module.update(parameters)
    try:
        yield
    finally:
        module.update(own)
