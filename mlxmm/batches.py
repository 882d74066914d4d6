"""Which batches a stage sees: those of any loader, limited, from any place in an epoch on, as trees of MLX arrays."""

import warnings
from collections.abc import Iterable, Iterator
from itertools import islice

import attrs
import mlx.core as mx
from mlx.utils import tree_map

from mlxmm.config import UserError


@attrs.frozen
class Loaders:
    """Loaders handed to the Trainer one by one, in the shape of a DataModule."""

    train: Iterable | None = None
    val: Iterable | None = None
    test: Iterable | None = None
    predict: Iterable | None = None

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def teardown(self, stage: str) -> None: ...

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val

    def test_dataloader(self):
        return self.test

    def predict_dataloader(self):
        return self.predict


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
