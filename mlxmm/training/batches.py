"""The batches of a stage: from any loader, limited, from any batch of an epoch on, as trees of MLX arrays."""

import warnings
from collections.abc import Iterator
from itertools import islice

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlxmm.errors import UserError


def count(loader, limit: int | float) -> int | None:
    """How many batches of an epoch are used: `limit`, or that fraction of them. None if the loader has no length."""
    total = _length(loader)
    if isinstance(limit, int):
        return limit if total is None else min(limit, total)
    if total is None and limit < 1:
        raise UserError(f"a fraction of the batches ({limit}) needs a loader with a length: give a number of batches")
    return total if total is None else int(total * limit)


def epoch(loader, number: int, start: int = 0, limit: int | float = 1.0) -> Iterator:
    """The batches of epoch `number` from batch `start` on.

    mlxmm's loaders start there directly; other iterables are read and skipped up to there.
    """
    if hasattr(loader, "epoch"):
        batches = loader.epoch(number, start)
    elif isinstance(loader, list | tuple):
        batches = iter(loader[start:])
    else:
        if start:
            warnings.warn(
                f"{type(loader).__name__} cannot start at batch {start}: skipping the batches before it",
                stacklevel=2,
            )
        batches = islice(iter(loader), start, None)
    most = count(loader, limit)
    if most is not None:
        batches = islice(batches, max(0, most - start))
    return map(as_arrays, batches)


def as_arrays(batch):
    """`batch` with MLX arrays in place of NumPy's, of numbers and of torch's tensors. Raises `UserError`."""
    try:
        return tree_map(mx.array, batch)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise UserError(f"a batch is a tree of arrays and numbers; {_misfit(batch) or error}") from None


def _misfit(batch) -> str | None:
    """The first leaf that cannot be an array, and what to do with it."""
    for name, leaf in tree_flatten(batch):
        try:
            mx.array(leaf)
        except (TypeError, ValueError, BufferError, RuntimeError):
            kind = type(leaf)
            advice = "leave it out of the batch, or make numbers of it"
            if kind.__module__.split(".")[0] == "torch":
                advice = "give tensor.detach().float().numpy()"
            elif hasattr(leaf, "__iter__") and not isinstance(leaf, str):
                advice = "a stage has one loader, and that gives dicts, lists or tuples"
            return f"{name or 'it'} holds {'None' if leaf is None else f'a {kind.__name__}'}: {advice}"
    return None


def _length(loader) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a loader without a length, or torch's over an iterable data set, which has __len__ all the same
        return None


def updates(batches: Iterator, size: int) -> Iterator[tuple[tuple, bool]]:
    """Groups of `size` batches (the last group may be smaller), and whether each is the last."""
    groups = iter(lambda: tuple(islice(batches, size)), ())
    group = next(groups, None)
    while group is not None:
        following = next(groups, None)
        yield group, following is None
        group = following
