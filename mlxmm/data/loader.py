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
    3 as it was the first time. Every process has its own share of the rows: with `drop_last` equally many, otherwise
    up to one more or less. Threads prepare a few batches ahead; they must not touch MLX, whose random key is
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
        num_rows = len(range(*self._share.indices(len(self.rows))))
        return num_rows // self.batch_size if self.drop_last else -(-num_rows // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """The batches of an epoch from number `start` on."""
        grain = _grain()
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        rows = grain.MapDataset.source(self.rows).seed(seed)
        if self.shuffle:
            rows = rows.shuffle()
        # Sliced last, so that a row's `rng` is the same whoever gets it.
        rows = rows.random_map(self.encode)[self._share]
        batches = rows.batch(self.batch_size, drop_remainder=self.drop_last)[start:]
        if self.complete_batch is not None:
            batches = batches.map(self.complete_batch)
        options = grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=4)
        return iter(batches.to_iter_dataset(options))

    @property
    def _share(self) -> slice:
        size = distributed.world_size()
        end = len(self.rows) // size * size if self.drop_last else len(self.rows)
        return slice(distributed.rank(), end, size)


def prefetched(batches: Iterator[dict]) -> Iterator[dict]:
    """`batches`, of which a thread makes a few ahead."""
    grain = _grain()

    class Made(grain.DatasetIterator):
        def __next__(self):
            return next(batches)

        def get_state(self):
            return {}  # a loader finds its place by number

        def set_state(self, state):
            raise NotImplementedError

    class Source(grain.IterDataset):
        def __iter__(self):
            return Made()

    return iter(grain.experimental.ThreadPrefetchIterDataset(Source(), prefetch_buffer_size=4))


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
