"""Which attributes of a module a traced function read: a compiled function has their values in it."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxmm.compute.layer_calls import replaced_classes
from mlxmm.errors import warn

PLAIN = (int, float, complex, bool, str, bytes, type(None))
# The Trainer, which changes all the time; what is frozen, which the Trainer looks after; the arrays of an optimizer.
UNSEEN = ("trainer", "_no_grad", "_state", "_initialized")


class Reads:
    """What was read within `recorded`, and whether it is still the same."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], Value] = {}  # by (id of the owner, name)

    @contextlib.contextmanager
    def recorded(self, modules: Iterable[nn.Module], others: Iterable[Any] = ()) -> Iterator[None]:
        """Within the block, note what is read of `modules` and the parts in them; of `others` everything counts."""
        read: dict[tuple[int, str], Any] = {}

        def wrap(kind: Any) -> type:
            def get(self, name):
                read[id(self), name] = self
                return kind.__getattribute__(self, name)

            return type(kind.__name__, (kind,), {"__getattribute__": get})

        with replaced_classes([part for module in modules for part in module.modules()], wrap):
            yield
        if any(name == "trainer" for _, name in read):
            told = "a compiled step keeps what it read there first. What changes belongs into an array of the module"
            warn(f"a step reads self.trainer: {told}")
        read |= {(id(other), name): other for other in others for name in vars(other)}
        # Their values at the end: what the function itself changes, such as a counter, is no change from outside.
        self._values |= {key: Value(owner, key[1]) for key, owner in read.items() if _is_held(owner, key[1])}

    def changed(self) -> str | None:
        """The name of an attribute that has another value now: "VAE.beta"."""
        for known in self._values.values():
            now = known.held.get(known.name, Nothing)
            if (now is not known.value or known.content is not None) and known.differs_from(now):
                return str(known)
        return None


def _is_held(owner, name: str) -> bool:
    held = vars(owner) if name in vars(owner) else owner if isinstance(owner, dict) else {}
    return name in held and name not in UNSEEN and not isinstance(held[name], mx.array)


class Value:
    """The value of an attribute, as it was."""

    __slots__ = ("owner", "name", "held", "value", "content")

    def __init__(self, owner, name: str):
        self.owner, self.name = owner, name
        self.held = vars(owner) if name in vars(owner) else owner
        self.value = self.held[name]
        is_whole = isinstance(self.value, PLAIN) or isinstance(self.value, nn.Module) or callable(self.value)
        self.content = None if is_whole else _comparable(self.value)

    def __str__(self):
        return f"{type(self.owner).__name__}.{self.name}"

    def differs_from(self, now) -> bool:
        if self.content is None:
            return not (isinstance(now, PLAIN) and now == self.value)
        return _comparable(now) != self.content


class Nothing:
    """In the place of arrays, which are arguments, and of methods: nothing that a trace keeps."""


class Same:
    """Equal to another of the same object: other objects are compared by what they are, not by what they hold."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Same) and self.value is other.value

    __hash__ = None


def _comparable(value):
    """What is equal as long as `value` is the same for a trace."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, mx.array):
        return Nothing
    if isinstance(value, nn.Module):
        return Same(value)
    if isinstance(value, list | tuple):
        return [_comparable(part) for part in value]
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items()}
    if isinstance(value, set):
        return set(value)
    plain = {name: part for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, PLAIN)}
    return Same(value), plain  # of settings, say, that are changed in place
