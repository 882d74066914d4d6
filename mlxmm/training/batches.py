"""The batches of a stage: from any loader, limited, from any batch of an epoch on, as trees of MLX arrays."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from numbers import Number

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxmm.errors import UserError, warn
from mlxmm.training.loader_randomness import begin_epoch, changes_in_place, epoch_seed, isolated


def count(loader, limit: int | float) -> int | None:
    """How many batches of an epoch are used: `limit`, or that fraction of them. None if the loader has no length."""
    total = _length(loader)
    if isinstance(limit, int):
        return limit if total is None else min(limit, total)
    if total is None and limit < 1:
        raise UserError(f"a fraction of the batches ({limit}) needs a loader with a length: give a number of batches")
    if total and 0 < limit * total < 1:
        told = f"give {1 / total:.2g} or more, or a number of batches"
        raise UserError(f"a limit of {limit} leaves none of {total} batches (limit_…_batches, overfit_batches): {told}")
    return total if total is None else int(total * limit)


def has_epochs(loader) -> bool:
    """Whether `loader` gives an epoch by its number, from any batch on: `loader.epoch(number, start)`."""
    return callable(getattr(loader, "epoch", None))  # of Hugging Face's streams it is a number


def epoch(loader, number: int, start: int = 0, limit: int | float = 1.0, seed: int = 0) -> Iterator:
    """The batches of epoch `number` from batch `start` on.

    mlxmm's loaders start there directly; other iterables are read and skipped up to there. What a loader draws is a
    function of (seed, number), and of the batches drawn before.
    """
    if isinstance(loader, list | tuple):
        batches = iter(loader[start:])
    else:
        skipped = 0 if has_epochs(loader) else start
        if skipped:
            told = f"{type(loader).__name__} cannot start at batch {start}: skipping the batches before it"
            warn(told)
        changes = (lambda: []) if has_epochs(loader) else changes_in_place(loader)
        every = isolated(lambda: _begun(loader, number, start, seed), epoch_seed(seed, number))
        batches = islice(_watched(every, changes), skipped, None)  # one by one, as they were taken the first time
    most = count(loader, limit)
    if most is not None:
        batches = islice(batches, max(0, most - start))
    return map(as_arrays, batches)


def _watched(batches: Iterator, changes: Callable[[], list[str]]) -> Iterator:
    """The batches; a warning once the loader has shuffled what it holds, at their beginning or at their end."""
    for place, batch in enumerate(batches):
        if place == 0:
            _warn_of(changes())
        yield batch
    _warn_of(changes())


def _warn_of(names: Sequence[str]) -> None:
    for name in names:
        warn(
            f"{name} is changed in place while it is read: a resumed run begins with it as it was at first, and has "
            "another order. Shuffle a copy, or give the loader epoch(number, start)"
        )


def _begun(loader, number: int, start: int, seed: int) -> Iterator:
    if has_epochs(loader):
        return iter(loader.epoch(number, start))
    begin_epoch(loader, seed, number)
    return iter(loader)


def as_arrays(batch):
    """`batch`, a tree of mappings, lists and tuples, with MLX arrays in place of NumPy's, of torch's tensors, of
    numbers and of lists of numbers. Raises `UserError` that names the field, and for a batch without examples: its
    loss is no number, and MLX's sums of empty views may not end (0.32, CPU)."""
    lengths: set[int] = set()
    arrays = _arrays(batch, "", lengths)
    if lengths == {0}:
        raise UserError("a batch has no examples: the first axis of all its arrays is of length 0")
    return arrays


def _arrays(value, name: str, lengths: set[int]):
    """`value` of arrays; the lengths of their first axes are added to `lengths`."""
    if isinstance(value, Mapping):  # not only dicts: a BatchEncoding of transformers, too
        return {key: _arrays(part, f"{name}.{key}", lengths) for key, part in value.items()}
    if isinstance(value, list | tuple) and not _is_numbers(value):
        parts = [_arrays(part, f"{name}.{i}", lengths) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    try:
        array = mx.array(value)
        lengths.update(array.shape[:1])
        return array
    except (TypeError, ValueError, BufferError, RuntimeError):
        what = f"{name[1:] or 'it'} holds {_advice(value)}"
        raise UserError(f"a batch is a tree of arrays and numbers; {what}") from None


def _is_numbers(value) -> bool:
    """Whether this is a list of numbers, or of lists of them; a tuple is a part of the batch's structure."""
    return isinstance(value, list) and all(isinstance(x, Number) or _is_numbers(x) for x in value) and bool(value)


def _advice(leaf) -> str:
    """What a leaf that cannot be an array is, and what to do with it."""
    kind, told = type(leaf), "leave it out of the batch, or make numbers of it"
    if leaf is None:
        return f"None: {told}"
    if kind.__module__.split(".")[0] == "torch":
        return f"a {kind.__name__}: give tensor.detach().float().numpy()"
    if hasattr(leaf, "dtype"):
        return f"an array of {leaf.dtype}: {told}"
    if isinstance(leaf, list):
        return "lists of different lengths: pad them to one"
    if hasattr(leaf, "__iter__") and not isinstance(leaf, str | bytes):
        return f"a {kind.__name__}: a stage has one loader, and that gives dicts, lists or tuples"
    return f"a {kind.__name__}: {told}"


def num_examples(batch) -> int:
    """The examples of a batch: the length of the first axis of its first array that has one."""
    return next((array.shape[0] for _, array in tree_flatten(batch) if isinstance(array, mx.array) and array.ndim), 1)


def _length(loader) -> int | None:
    try:
        return len(loader)
    except (TypeError, AttributeError, NotImplementedError):  # none; torch's, over a stream, has __len__ all the same
        return None


def updates(batches: Iterator, size: int) -> Iterator[tuple[tuple, bool]]:
    """Groups of `size` batches (the last group may be smaller), and whether each is the last."""
    groups = iter(lambda: tuple(islice(batches, size)), ())
    group = next(groups, None)
    while group is not None:
        following = next(groups, None)
        yield group, following is None
        group = following
