"""What a compiled update was traced with: when it changes, the update is compiled again."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlxmm.compute.named_arrays import array_places
from mlxmm.storage.checkpoint import load_optimizer


class TraceSnapshot:
    """Snapshot of the parts of a module, their frozen flags, train/eval modes and shapes."""

    def __init__(self, module: nn.Module):
        self._parts = [(part, part.training, frozenset(part._no_grad)) for part in module.modules()]
        self._children = list(_children(module))
        self._places = {name: (node, key, node[key].shape) for name, (node, key) in array_places(module)}
        nodes = {id(node): node for node in [module, *(node for node, _, _ in self._children)]}
        self._lengths = [(node, len(node)) for node in nodes.values()]

    def changed(self) -> bool:
        """True if anything was frozen, unfrozen, switched or replaced since: the step must be compiled again."""
        return (
            any(part._training is not mode or part._no_grad != frozen for part, mode, frozen in self._parts)
            or any(len(node) != length for node, length in self._lengths)
            or any(_held(node, key) is not child for node, key, child in self._children)
            or any(getattr(_held(node, key), "shape", None) != shape for node, key, shape in self._places.values())
        )

    def replaced(self, module: nn.Module) -> set[str]:
        """The dotted names of the arrays that `module` had, and has no more, or in other parts or shapes."""
        now = {name: (id(node), node[key].shape) for name, (node, key) in array_places(module)}
        return {name for name, (node, _, shape) in self._places.items() if now.get(name) != (id(node), shape)}


def forget_moments(optimizer: optim.Optimizer, module: nn.Module, before: TraceSnapshot) -> None:
    """Drop what `optimizer` knows of parameters that were replaced since `before`."""
    if not (names := before.replaced(module)):
        return
    known = dict(tree_flatten(optimizer.state))
    is_of = lambda array, name: array.startswith(f"{name}.")
    groups = range(len(getattr(optimizer, "optimizers", ())))
    stale = [*names] + [f"states.{i}.{name}" for i in groups for name in names]
    kept = {array: value for array, value in known.items() if not any(is_of(array, name) for name in stale)}
    load_optimizer(kept, optimizer, module)


def _children(node) -> Iterator[tuple[Any, Any, Any]]:
    """(container, key, child) of all parts, and of all lists and dicts that hold parts or arrays."""
    for key, child in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
        if not str(key).startswith("_") and isinstance(child, dict | list) and _holds_network(child):
            yield node, key, child
            yield from _children(child)


def _holds_network(value) -> bool:
    if isinstance(value, mx.array | nn.Module):
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_holds_network, inner))


def _held(node, key):
    return node.get(key) if isinstance(node, dict) else node[key] if key < len(node) else None
