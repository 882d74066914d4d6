"""IndexCheck: labels and ids must be within what they index. MLX checks no index: others read and write foreign memory.

C classes, or rows of a table.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxmm.compute import functional
from mlxmm.compute.layer_calls import replaced_calls
from mlxmm.errors import UserError, warn

TABLES = (nn.Embedding, nn.QuantizedEmbedding)
PATCHING = threading.RLock()


class OutOfRange(UserError):
    """Labels or ids that index something that is not there."""


class IndexCheck:
    """Checks the batches of one `step` of `module`. Raises `UserError` for what is out of range.

    While the step's Python runs for the first time, most often to be traced, it is noted which arrays of the batch are
    indices, and of what. Their values are checked then, and before each later step: they are on the host, and nothing
    waits for the device. Indices that the step computes, also as another shape of these, are not checked.
    """

    def __init__(self, module: nn.Module, step: Callable):
        self._module, self._step = module, step
        self._limits: dict[str, tuple[str, int]] | None = None  # what an array of the batch indexes, and C
        self._arrays: dict[str, mx.array] = {}  # of the batch in hand, until that is known
        self._has_warned = False

    def check(self, batch: Any) -> None:
        """Check `batch`, a tree of arrays, which the step is about to use."""
        if self._limits == {}:
            return
        arrays = dict(tree_flatten(batch))
        if self._limits is None:
            self._arrays = arrays
        for name in arrays.keys() & (self._limits or {}).keys():
            self._check(arrays[name], *self._limits[name])

    @contextlib.contextmanager
    def noted(self, batch: Any) -> Iterator[None]:
        """Within the block, the first time, what is indexed by arrays of `batch` is noted, and these are checked: they
        may be tracers, which have no values, of the arrays that `check` was given."""
        if self._limits is not None:
            yield
            return
        names, limits = {id(array): name for name, array in tree_flatten(batch)}, {}

        def note(what: str, indices, size: int) -> None:
            name = names.get(id(indices))
            if name in self._arrays and mx.issubdtype(indices.dtype, mx.integer):
                limits[name] = min(limits.get(name, (what, size)), (what, size), key=lambda limit: limit[1])
                self._check(self._arrays[name], what, size)

        with _noted_indices(self._module, note):
            yield
        self._limits, self._arrays = limits, {}

    def _check(self, indices: mx.array, what: str, size: int) -> None:
        if not indices.size:
            return
        values = np.asarray(indices)
        low, high = int(values.min()), int(values.max())
        told = f"{getattr(self._step, '__name__', 'the step')}: {what} are {low} to {high}, and must be 0 to {size - 1}"
        advice = "give examples to be ignored, such as torch's -100, a valid label, and weights=0"
        if low < -size or high >= size:
            raise OutOfRange(f"{told}{': ' + advice if low < 0 else ''}")
        if low < 0 and what.startswith("labels") and not self._has_warned:
            self._has_warned = True
            warn(f"{told}: MLX counts negative ones from the end; {advice}")


@contextlib.contextmanager
def _replaced(owner, name: str, value) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _noted_indices(module: nn.Module, note: Callable[[str, Any, int], None]) -> Iterator[None]:
    """Within the block, `note(what, indices, size)` is called before this thread indexes by functions of MLX."""
    tables = {name: part for name, part in module.named_modules() if isinstance(part, TABLES)}
    note = _of_this_thread(note)
    with PATCHING, contextlib.ExitStack() as stack:
        stack.enter_context(replaced_calls(tables, lambda name, lookup: _of_table(name, lookup, note)))
        for owner, name, wrap in (
            (nn.losses, "cross_entropy", _of_labels),
            (functional, "cross_entropy", _of_labels),
            (mx, "take", _of_take),
        ):
            stack.enter_context(_replaced(owner, name, wrap(getattr(owner, name), note)))
        yield


def _of_this_thread(note: Callable) -> Callable:
    own = threading.get_ident()
    return lambda *args: note(*args) if threading.get_ident() == own else None


def _of_labels(cross_entropy: Callable, note: Callable) -> Callable:
    def call(logits, targets, *args, **settings):
        size = logits.shape[settings.get("axis", -1)]
        if targets.ndim < logits.ndim:
            note(f"labels for {size} classes", targets, size)
        return cross_entropy(logits, targets, *args, **settings)

    return call


def _of_take(take: Callable, note: Callable) -> Callable:
    def call(array, indices, *args, **settings):
        axis = settings.get("axis", args[0] if args else None)
        note(f"the indices of {take.__name__}", indices, array.size if axis is None else array.shape[axis])
        return take(array, indices, *args, **settings)

    return call


def _of_table(name: str, lookup: Callable, note: Callable) -> Callable:
    def call(self, ids):
        note(f"the ids for {name or type(self).__name__}", ids, len(self.weight))
        return lookup(self, ids)

    return call
