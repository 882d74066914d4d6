"""mx.compile for training: a bounded number of compiled variants, and traces that leave nothing behind if they fail."""

import functools
import shutil
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable

import attrs
import mlx.core as mx
from mlx.utils import tree_flatten


class Compiled:
    """`function` compiled once per shape of its arguments, for the `most` shapes used last.

    `state` are the trees that `function` reads and writes beside its arguments. MLX keeps every variant it ever
    compiled (mlx#4464), so each variant is a compiled function of its own here, freed when it is dropped.
    """

    def __init__(self, function: Callable, state: list, most: int):
        self._function, self._state, self._most = function, state, most
        self._variants: OrderedDict[tuple, Callable] = OrderedDict()
        self.num_traces = 0

    def __len__(self) -> int:
        return len(self._variants)

    def __call__(self, *args):
        shapes = tuple(_shape(leaf) for _, leaf in tree_flatten(args))
        if (variant := self._variants.get(shapes)) is not None:
            self._variants.move_to_end(shapes)
            return variant(*args)
        restore, key = snapshot(self._state), mx.random.state[0]
        # MLX identifies a compiled function by the object it was made from: each variant needs an object of its own.
        variant = mx.compile(functools.partial(self._function), inputs=self._state, outputs=self._state)
        try:
            outputs = variant(*args)  # traces: this is the call that runs `function` as Python
            if mx.default_device() == mx.cpu:
                mx.eval(outputs, self._state)  # calls the C++ compiler, which Ctrl-C in a terminal ends too
        except BaseException:
            restore()  # MLX leaves its tracers in the state, which nothing can evaluate
            high, low = key.tolist()  # and in the random key, from which the next module would draw its weights
            mx.random.seed(high << 32 | low)
            raise
        self._keep(shapes, variant)
        return outputs

    def _keep(self, shapes: tuple, variant: Callable) -> None:
        """Keep a new variant, in place of the one that was not used for the longest time."""
        if len(self._variants) == self._most:
            self._variants.popitem(last=False)
        self._variants[shapes] = variant
        self.num_traces += 1
        if self.num_traces == self._most + 1:
            warnings.warn(
                f"more than {self._most} batch shapes: those used least are compiled again when they return. "
                "Pad to fewer lengths, or raise max_compiled_variants",
                stacklevel=4,
            )


@attrs.frozen
class Compiler:
    """Makes `Compiled` functions and counts their variants; returns functions as they are if not `enabled`."""

    enabled: bool
    most: int
    _made: weakref.WeakSet = attrs.field(factory=weakref.WeakSet, init=False)

    def __call__(self, function: Callable, state: list) -> Callable:
        if not self.enabled:
            return function
        compiled = Compiled(function, state, self.most)
        self._made.add(compiled)
        return compiled

    @property
    def num_variants(self) -> int:
        """How many compiled variants are alive."""
        return sum(map(len, self._made))


def can_compile() -> bool:
    """Whether compiled steps can run here: on a CPU, MLX calls a C++ compiler. Warns once if they cannot."""
    if mx.default_device() != mx.cpu or shutil.which("g++"):
        return True
    _warn_of_plain_python()
    return False


@functools.cache
def _warn_of_plain_python() -> None:
    warnings.warn(
        "MLX compiles kernels for the CPU with g++, which was not found: training runs uncompiled",
        stacklevel=3,
    )


def snapshot(tree) -> Callable[[], None]:
    """Record every array in nested dicts and lists; return a function that restores them in place."""
    places = [(node, key, node[key]) for node in _nodes(tree) for key in _keys(node)]

    def restore() -> None:
        for node, key, array in places:
            node[key] = array

    return restore


def _nodes(tree):
    if isinstance(tree, dict | list):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _nodes(child)


def _keys(node):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return [key for key, value in items if isinstance(value, mx.array)]


def _shape(leaf):
    return (leaf.shape, leaf.dtype) if isinstance(leaf, mx.array) else leaf
