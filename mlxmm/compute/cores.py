"""Both halves of a batch at once, on two cores of a Linux CPU.

MLX computes one operation of a stream after another, each on one core; only matrix products have the threads of
OpenBLAS, which wait for each other at the end of each product. So while a module is trained or asked, a product has one
thread, and functions that treat every row alike compute two halves of the rows, each in a stream of its own. They are
two on any number of cores, so that the numbers do not depend on it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxmm import environment
from mlxmm.compute import linux_blas

SMALL = 2_000_000  # parameters at most: the products of a larger module keep more than two cores busy

_has_halves = False


@contextlib.contextmanager
def cores_for(module: nn.Module, num_rows: int | None = None) -> Iterator[None]:
    """Within the block, rows are computed in halves, and products have one thread; not where there is one core, or
    `num_rows` is 1, or `module` is large and there are more than two cores."""
    global _has_halves
    cores = linux_blas.num_threads()
    if not _uses_halves(module, num_rows, cores or 1):
        yield
        return
    before, _has_halves = _has_halves, True
    linux_blas.set_num_threads(1)
    try:
        yield
    finally:
        _has_halves = before
        linux_blas.set_num_threads(cores)


def in_halves(function: Callable, *arrays: mx.array):
    """`function(*arrays)`, which takes arrays (B, ...) to (B, ...), or to a tree of them, row by row: one half of the
    rows on each core."""
    outputs = in_streams(lambda half: function(*half), halves(*arrays))
    return outputs[0] if len(outputs) == 1 else tree_map(lambda *parts: mx.concatenate(parts), *outputs)


def halves(*arrays: mx.array) -> list[tuple[mx.array, ...]]:
    """The first half of the rows of each array, then the second; or all of them, where halves are of no use."""
    if not _has_halves or len(arrays[0]) < 2:
        return [arrays]
    middle = (len(arrays[0]) + 1) // 2  # mx.compile fails where mx.split cuts one array twice (0.32)
    return [tuple(array[:middle] for array in arrays), tuple(array[middle:] for array in arrays)]


def in_streams(function: Callable, parts: Sequence) -> list:
    """`function(part)` of each of `halves`, each in a stream of its own."""
    if len(parts) == 1:
        return [function(parts[0])]
    found = []
    for stream, part in zip(_streams(), parts, strict=True):
        with mx.stream(stream):
            found.append(function(part))
    return found


class custom_function:  # noqa: N801  (it stands in for mx.custom_function)
    """`mx.custom_function` whose gradient is computed in the stream of its function, as those of MLX's own are."""

    def __init__(self, function: Callable):
        self._function, self._gradient = function, None

    def vjp(self, gradient: Callable) -> Callable:
        """Decorates the gradient: `gradient(primals, cotangents, outputs)`."""
        self._gradient = gradient
        return gradient

    def __call__(self, *arrays):
        stream = mx.default_stream(mx.default_device())
        called = mx.custom_function(self._function)

        @called.vjp
        def _(*args):
            with mx.stream(stream):
                return self._gradient(*args)

        return called(*arrays)


def _uses_halves(module: nn.Module, num_rows: int | None, cores: int) -> bool:
    if cores == 1 or not environment.uses_linux_functions() or mx.default_device() != mx.cpu:
        return False
    return _is_small(module) or (cores == 2 and num_rows != 1)


def _is_small(module: nn.Module) -> bool:
    return sum(array.size for _, array in tree_flatten(module.parameters())) <= SMALL


@functools.cache
def _streams() -> list:
    """MLX's streams belong to a thread: these two are others in each."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(2)]
