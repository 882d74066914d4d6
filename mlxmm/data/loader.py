"""Loader: from rows to batches, in an order that is a function of (seed, epoch). Built on grain."""

import logging
from collections.abc import Callable, Iterator, Sequence

import attrs
import numpy as np

from mlxmm import distributed


@attrs.frozen(kw_only=True)
class Loader:
    """Batches of `encode(row, rng)`, a dict of NumPy arrays of fixed shapes, stacked along a first axis.

    `rng` is a function of (seed, epoch, place in the epoch) too, so `epoch(3, start=7)` gives batch 7 of epoch
    3 as it was the first time. Threads prepare a few batches ahead; they must not touch MLX, whose random key is
    each thread's own.
    """

    rows: Sequence
    encode: Callable[[dict, np.random.Generator], dict]
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    drop_last: bool = False
    num_threads: int = 1
    complete_batch: Callable[[dict], dict] | None = None  # adds what only a whole batch can tell

    def __len__(self) -> int:
        num_rows = len(range(distributed.rank(), len(self.rows), distributed.world_size()))
        return num_rows // self.batch_size if self.drop_last else -(-num_rows // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """The batches of an epoch from number `start` on; every process gets its own share of the rows."""
        grain = _grain()
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        rows = grain.MapDataset.source(self.rows).seed(seed)
        if self.shuffle:
            rows = rows.shuffle()
        rows = rows[distributed.rank() :: distributed.world_size()].random_map(self.encode)
        batches = rows.batch(self.batch_size, drop_remainder=self.drop_last)[start:]
        if self.complete_batch is not None:
            batches = batches.map(self.complete_batch)
        options = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=4)
        return iter(batches.to_iter_dataset(options))


def _grain():
    """grain, without its remark that JAX's profiler is not there."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import grain
    finally:
        logger.setLevel(level)
    return grain
