"""What can be done to a module's layers for the length of a run: recompute them, or watch what they give."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping

import mlx.nn as nn


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


def repeated_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The entries of all lists called `layers`, by their dotted names."""
    return {name: part for name, part in module.named_modules() if re.search(r"(^|\.)layers\.\d+$", name)}


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
