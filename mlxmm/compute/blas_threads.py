"""How many threads a module's products have on a Linux CPU: one where it is small.

Threads wait for each other at the end of each product. Where products are small this costs more than they save, and
many times more on a machine whose cores others use too; the other cores have the data to prepare.
"""

import contextlib
from collections.abc import Iterator

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm import environment
from mlxmm.compute import linux_blas

SMALL = 2_000_000  # parameters at most


@contextlib.contextmanager
def threads_for(module: nn.Module) -> Iterator[None]:
    """Within the block, products have one thread if `module` is small, unless OPENBLAS_NUM_THREADS is set."""
    before = linux_blas.num_threads()
    if before is None or environment.blas_threads_are_set() or not _is_small(module):
        yield
        return
    linux_blas.set_num_threads(1)
    try:
        yield
    finally:
        linux_blas.set_num_threads(before)


def _is_small(module: nn.Module) -> bool:
    return sum(array.size for _, array in tree_flatten(module.parameters())) <= SMALL
