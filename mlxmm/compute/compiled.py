"""mx.compile for training: a bounded number of compiled variants, and traces that leave nothing behind if they fail."""

import functools
import shutil
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm.compute import kernel_header
from mlxmm.compute.reads import Reads
from mlxmm.errors import UserError, warn


class Compiled:
    """`function` compiled once per shape of its arguments, for the `most` shapes used last.

    `state` are the trees that `function` reads and writes beside its arguments; `others` are objects whose attributes
    it reads. It is compiled again when an attribute that it read, of a module in `state` too, has another value.

    MLX keeps every variant it ever compiled (mlx#4464), so each variant is a compiled function of its own here, freed
    when it is dropped.
    """

    def __init__(self, function: Callable, state: list, most: int, others: Sequence = ()):
        self._function, self._state, self._most, self._others = function, state, most, others
        self._variants: OrderedDict[tuple, Callable] = OrderedDict()
        self._reads, self._has_dropped = Reads(), False
        self.num_traces = 0

    def __len__(self) -> int:
        return len(self._variants)

    def __call__(self, *args):
        if name := self._reads.changed():
            self._forget(name)
        shapes = tuple(_shape(leaf) for _, leaf in tree_flatten(args))
        if (variant := self._variants.get(shapes)) is not None:
            self._variants.move_to_end(shapes)
            return variant(*args)
        if mx.default_device() == mx.cpu:
            kernel_header.precompile()
        restore, key, names = snapshot(self._state), mx.random.state[0], _names(self._state)
        # MLX identifies a compiled function by the object it was made from: each variant needs an object of its own.
        variant = mx.compile(functools.partial(self._function), inputs=self._state, outputs=self._state)
        try:
            with self._reads.recorded([tree for tree in self._state if isinstance(tree, nn.Module)], self._others):
                outputs = variant(*args)  # traces: this is the call that runs `function` as Python
            _check_names(self._state, names)
            if mx.default_device() == mx.cpu:
                mx.eval(outputs, self._state)  # calls the C++ compiler, which Ctrl-C in a terminal ends too
        except BaseException:
            restore()  # MLX leaves its tracers in the state, which nothing can evaluate
            high, low = key.tolist()  # and in the random key, from which the next module would draw its weights
            mx.random.seed(high << 32 | low)
            raise
        self._keep(shapes, variant)
        return outputs

    def _forget(self, changed: str) -> None:
        """Drop all variants, which were traced with another value of the attribute `changed`."""
        self._variants.clear()
        self._reads = Reads()
        if not changed.partition(".")[2].startswith("_"):
            told = "one that changes often is better an array, frozen by freeze(keys=[...], recurse=False)"
            warn(f"{changed} has changed, and the step is compiled again with it: {told}")

    def _keep(self, shapes: tuple, variant: Callable) -> None:
        """Keep a new variant, in place of the one that was not used for the longest time."""
        is_full = len(self._variants) == self._most
        if is_full:
            self._variants.popitem(last=False)
        self._variants[shapes] = variant
        self.num_traces += 1
        if is_full and not self._has_dropped:
            self._has_dropped = True
            warn(
                f"more than {self._most} batch shapes: those used least are compiled again when they return. "
                "Pad to fewer lengths, or raise max_compiled_variants",
            )


@attrs.frozen
class Compiler:
    """Makes `Compiled` functions and counts their variants; returns functions as they are if not `enabled`."""

    enabled: bool
    most: int
    _made: weakref.WeakSet = attrs.field(factory=weakref.WeakSet, init=False)

    def __call__(self, function: Callable, state: list, others: Sequence = ()) -> Callable:
        if not self.enabled:
            return function
        compiled = Compiled(function, state, self.most, others)
        self._made.add(compiled)
        return compiled

    @property
    def num_variants(self) -> int:
        """How many compiled variants are alive."""
        return sum(map(len, self._made))


def can_compile() -> bool:
    """Whether compiled steps can run here: on a CPU, MLX calls a C++ compiler."""
    return mx.default_device() != mx.cpu or shutil.which("g++") is not None


@functools.cache
def warn_of_plain_python() -> None:
    """Say once that compiled steps cannot run here."""
    warn("MLX compiles kernels for the CPU with g++, which was not found: training runs uncompiled")


def snapshot(tree) -> Callable[[], None]:
    """Record what nested dicts and lists hold; return a function that restores it in place."""
    contents = [(node, dict(node) if isinstance(node, dict) else list(node)) for node in _nodes(tree)]

    def restore() -> None:
        for node, held in contents:
            if isinstance(node, dict):  # a module's own `update` is of parameters
                dict.clear(node)
                dict.update(node, held)
            else:
                node[:] = held

    return restore


def _names(state: list) -> set[str]:
    """The names of the arrays in the trees of a compiled function."""
    return {name for name, leaf in tree_flatten(state) if isinstance(leaf, mx.array)}


def _check_names(state: list, names: set[str]) -> None:
    """Raise `UserError` where a function has added arrays to its state, or taken some out: MLX finds those that it
    had by their number, and from then on nothing can be computed in this process."""
    if changed := sorted(_names(state) ^ names):
        place = changed[0].partition(".")[2]
        raise UserError(
            f"a step changes which arrays its module has ({place}): it is compiled, may replace arrays and add none. "
            'Return what is measured, {"loss": loss, "mine": x.mean()}: callbacks get it'
        )


def _nodes(tree):
    if isinstance(tree, dict | list):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _nodes(child)


def _shape(leaf):
    return (leaf.shape, leaf.dtype) if isinstance(leaf, mx.array) else leaf
