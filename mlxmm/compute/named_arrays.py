"""The arrays of a module by their dotted names, also those in lists and dicts of any keys.

`tree_unflatten` makes a list of a dict whose keys are digits, and levels of the dots in a key; `nn.Module.update`
refuses the empty dicts that stand for frozen arrays in a list. Here a name means the place that has it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def is_differentiable(value) -> bool:
    """False for arrays of integers and booleans, which have no gradient; True for everything else."""
    return not isinstance(value, mx.array) or mx.issubdtype(value.dtype, mx.inexact)


def trainable_arrays(part: nn.Module) -> dict:
    """`part.trainable_parameters()` without arrays of integers and booleans."""
    is_trained = lambda m, key, value: nn.Module.trainable_parameter_filter(m, key, value) and is_differentiable(value)
    return part.filter_and_map(is_trained)


def own_arrays(part: nn.Module) -> list[str]:
    """The names, in `part`, of its arrays that are not of a part below it: "weight", "gains.0"."""
    return [name for name, _ in array_places(part, lambda child: not isinstance(child, nn.Module))]


def put_arrays(module: nn.Module, tree: Any, strict: bool = True) -> None:
    """Put the arrays of `tree`, nested or by dotted names, into `module`. Raises `ValueError` for a name it lacks."""
    places = dict(array_places(module))
    for name, array in tree_flatten(tree):
        if name in places and isinstance(array, mx.array):
            node, key = places[name]
            node[key] = array
        elif strict:
            what = "takes arrays only, as" if name in places else "has no parameter named"
            raise ValueError(f"{type(module).__name__} {what} {name!r}")


def unflatten_like(arrays: Mapping[str, mx.array], like: Any) -> Any:
    """`arrays` by dotted names as a tree with the keys, dicts and lists of `like`; what it lacks as MLX would."""
    if not isinstance(like, dict | list):
        return tree_unflatten(list(arrays.items())) if arrays else {}
    rest, parts = dict(arrays), {}
    children = {str(key): child for key, child in _items(like)}
    for key in sorted(children, key=len, reverse=True):  # "a.b" before "a", which would take what is in "a.b"
        own = {name[len(key) + 1 :]: rest.pop(name) for name in list(rest) if name.startswith(f"{key}.")}
        parts[key] = unflatten_like(own, children[key]) if own else {}
    if isinstance(like, list):
        return [parts[key] for key in children]
    found = {key: parts[key] for key in children if parts[key]}
    return found | (tree_unflatten(list(rest.items())) if rest else {})


def array_places(
    node, enters: Callable[[Any], bool] = lambda child: True, prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(name, (container, key)) of each array; `enters(child)` says which containers to look into."""
    for key, value in _items(node):
        if isinstance(value, mx.array):
            yield f"{prefix}{key}", (node, key)
        elif isinstance(value, dict | list) and enters(value):
            yield from array_places(value, enters, f"{prefix}{key}.")


def _items(node):
    return list(node.items()) if isinstance(node, dict) else list(enumerate(node))
