"""IndexCheck: labels and ids must be within what they index. MLX checks no index: others read and write foreign memory.

C classes, or rows of a table.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxmm.compute import functional
from mlxmm.compute.compiled import snapshot
from mlxmm.compute.layer_calls import replaced_calls
from mlxmm.compute.precision import autocast
from mlxmm.distributed import collectives
from mlxmm.errors import UserError, warn
from mlxmm.training.randomness import isolated_random_state

TABLES = (nn.Embedding, nn.QuantizedEmbedding)


class OutOfRange(UserError):
    """Labels or ids that index something that is not there."""


class IndexCheck:
    """Checks the batches of one `step` of `module`. Raises `UserError` for what is out of range.

    Of the first batch, all indices are read, wherever the step makes them: it runs once as plain Python, which
    computes nothing but these. Later, the arrays of a batch that were indices themselves are: they are on the host, and
    nothing waits for the device. Several processes are not checked, as their steps wait for each other.
    """

    def __init__(self, module: nn.Module, step: Callable, precision: str):
        self._module, self._step, self._precision = module, step, precision
        self._limits: dict[str, tuple[str, int]] | None = None  # what an array of the batch indexes: its name, and C
        self._has_warned = False

    def __call__(self, batch: Any) -> None:
        """Check `batch`, a tree of arrays."""
        if self._limits is None:
            self._limits = {}
            if collectives.world_size() == 1:
                self._run(batch)
        elif self._limits:
            arrays = dict(tree_flatten(batch))
            for name, (what, size) in self._limits.items():
                if name in arrays:
                    self._check(what, arrays[name], size)

    def _run(self, batch) -> None:
        names = {id(array): name for name, array in tree_flatten(batch)}

        def note(what: str, indices, size: int) -> None:
            if isinstance(indices, mx.array) and mx.issubdtype(indices.dtype, mx.integer) and indices.size:
                self._check(what, indices, size)
                if id(indices) in names:
                    self._limits[names[id(indices)]] = what, size

        with contextlib.ExitStack() as stack:
            for context in (isolated_random_state(), _unchanged(self._module), _noted_indices(self._module, note)):
                stack.enter_context(context)
            stack.enter_context(autocast(self._module, self._precision))
            try:
                self._step(batch)
            except OutOfRange:
                raise
            except Exception:  # noqa: BLE001, S110: the step itself comes next, and raises it where it belongs
                pass

    def _check(self, what: str, indices: mx.array, size: int) -> None:
        try:
            values = np.asarray(indices)
        except ValueError:  # within a transformation of the step's own: there is nothing to read
            return
        low, high = int(values.min()), int(values.max())
        told = f"{getattr(self._step, '__name__', 'the step')}: {what} are {low} to {high}, and must be 0 to {size - 1}"
        advice = "give examples to be ignored, such as torch's -100, a valid label, and weights=0"
        if low < -size or high >= size:
            raise OutOfRange(f"{told}{': ' + advice if low < 0 else ''}")
        if low < 0 and what.startswith("labels") and not self._has_warned:
            self._has_warned = True
            warn(f"{told}: MLX counts negative ones from the end; {advice}")


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """At the end of the block, `module` and its parts have the arrays and attributes that they had before."""
    restore_arrays = snapshot([module.state])
    held = [(part, dict(part), dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, items, attributes in held:
            for own, before in ((part, items), (vars(part), attributes)):
                dict.clear(own)
                dict.update(own, before)
        restore_arrays()


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
    """Within the block, `note(what, indices, size)` is called before arrays are indexed by the functions of MLX."""

    def of_labels(cross_entropy):
        def call(logits, targets, *args, axis=-1, **settings):
            if targets.ndim < logits.ndim:
                note(f"labels for {logits.shape[axis]} classes", targets, logits.shape[axis])
            axis = {} if cross_entropy is functional_cross_entropy else {"axis": axis}
            return cross_entropy(logits, targets, *args, **axis, **settings)

        return call

    def of_take(take):
        def call(array, indices, *args, **settings):
            axis = settings.get("axis", args[0] if args else None)
            size = array.size if axis is None else array.shape[axis]
            note(f"the indices of {take.__name__}", indices, size)
            return take(array, indices, *args, **settings)

        return call

    def of_table(name, lookup):
        def call(self, ids):
            note(f"the ids for {name or type(self).__name__}", ids, len(self.weight))
            return lookup(self, ids)

        return call

    functional_cross_entropy = functional.cross_entropy
    tables = {name: part for name, part in module.named_modules() if isinstance(part, TABLES)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced_calls(tables, of_table))
        for owner, name, wrap in (
            (nn.losses, "cross_entropy", of_labels),
            (functional, "cross_entropy", of_labels),
            (mx, "take", of_take),
            (mx, "take_along_axis", of_take),
        ):
            stack.enter_context(_replaced(owner, name, wrap(getattr(owner, name))))
        yield
