"""Which batches a stage sees: those of any loader, limited, from any place in an epoch on, as trees of MLX arrays."""

import warnings
from collections.abc import Iterator
from itertools import islice

import mlx.core as mx
from mlx.utils import tree_map

from mlxmm.errors import UserError


def count(loader, limit: int | float) -> int | None:
    """How many batches of an epoch are used: `limit`, or that fraction of them. None where nothing tells."""
    total = len(loader) if hasattr(loader, "__len__") else None
    if isinstance(limit, int):
        return limit if total is None else min(limit, total)
    if total is None and limit < 1:
        raise UserError(f"{limit} of the batches are wanted of a loader that has no length: give their number")
    return total if total is None else int(total * limit)


def epoch(loader, number: int, start: int = 0, limit: int | float = 1.0) -> Iterator:
    """The batches of epoch `number` from batch `start` on.

    Our loaders go there directly; of any other iterable the first batches are skipped.
    """
    if hasattr(loader, "epoch"):
        batches = loader.epoch(number, start)
    else:
        if start:
            warnings.warn(f"{type(loader).__name__} cannot start at batch {start}: skipping to it", stacklevel=2)
        batches = islice(iter(loader), start, None)
    most = count(loader, limit)
    if most is not None:
        batches = islice(batches, max(0, most - start))
    return (tree_map(mx.array, batch) for batch in batches)


def updates(batches: Iterator, size: int) -> Iterator[tuple[tuple, bool]]:
    """Groups of `size` batches, the last one smaller if they do not come out even, and whether it is the last."""
    groups = iter(lambda: tuple(islice(batches, size)), ())
    group = next(groups, None)
    while group is not None:
        following = next(groups, None)
        yield group, following is None
        group = following
