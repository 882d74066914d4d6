"""Loader: from rows to batches, in an order that is a function of (seed, epoch). Built on grain."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import attrs
import numpy as np

from mlxmm.data.sources.rows import MAX_UNUSABLE
from mlxmm.data.sources.stream import MIN_UNUSABLE, StreamRows, UnusableRow
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.terminal import say

WINDOW = 32  # batches among whose rows those of like lengths are found
NUM_PREFETCHED = 4  # batches that are prepared ahead, or one for each thread


@attrs.frozen
class Part:
    """The rows of one source in a mixture, and how often an epoch has each: 0.5 is a random half, 2 is each twice."""

    num_rows: int
    weight: float

    @property
    def num_drawn(self) -> int:
        """The rows that an epoch has of it."""
        return round(self.weight * self.num_rows)


@attrs.frozen(kw_only=True)
class Loader:
    """Batches of `transform(row, rng)`, a dict of NumPy arrays of fixed shapes, stacked along a first axis.

    `rng` is a function of (seed, epoch, place in the epoch), so `epoch(3, start=7)` yields batch 7 of epoch 3 exactly
    as the first time. Every process has its own share of the rows: with `drop_last` all have equally many, otherwise
    shares may differ by one. Threads prepare a few batches ahead; `transform` must not use MLX there, whose random key
    belongs to a thread.
    """

    rows: Sequence
    transform: Callable[[dict, np.random.Generator], dict]
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    drop_last: bool = False
    num_threads: int = 1
    collate: Callable[[dict], dict] | None = None  # completes a batch of stacked examples
    lengths: Sequence[int] | None = None  # of `rows`; a batch then has rows of about one length, so that it pads little
    parts: tuple[Part, ...] = ()  # of `rows`, one after the other, where an epoch does not have each row once

    def __attrs_post_init__(self):
        assert self.lengths is None or not self.parts, "the rows of a mixture are not drawn by length"

    def __len__(self) -> int:
        num_rows = len(range(*self._share.indices(self.num_drawn)))
        return num_rows // self.batch_size if self.drop_last else -(-num_rows // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """The batches of an epoch from number `start` on."""
        grain = _grain()
        rows = self._drawn(grain.MapDataset.source(self.rows), epoch).seed(_seed(self.seed, epoch))
        if self.lengths is not None:
            rows = grain.MapDataset.source(_Ordered(self.rows, self._by_length(epoch))).seed(_seed(self.seed, epoch))
        elif self.shuffle:
            rows = rows.shuffle()
        # Sliced last, so that the `rng` of a row is the same on whichever process it lands.
        rows = rows.random_map(self.transform)[self._share]
        batches = rows.batch(self.batch_size, drop_remainder=self.drop_last)[start:]
        if self.collate is not None:
            batches = batches.map(self.collate)
        options = grain.ReadOptions(
            num_threads=self.num_threads, prefetch_buffer_size=max(NUM_PREFETCHED, self.num_threads)
        )
        return iter(batches.to_iter_dataset(options))

    @property
    def num_drawn(self) -> int:
        """The rows that an epoch has, of all processes together."""
        return sum(part.num_drawn for part in self.parts) if self.parts else len(self.rows)

    def _drawn(self, rows: Any, epoch: int) -> Any:
        """The rows of `epoch`: of each part as many as its weight says, a function of (seed, epoch, part)."""
        drawn, start = [], 0
        for number, part in enumerate(self.parts):
            own, start = rows[start : start + part.num_rows], start + part.num_rows
            if part.num_drawn:
                own = own.shuffle(seed=_seed(self.seed, epoch, number)).repeat(math.ceil(part.weight))
                drawn.append(own[: part.num_drawn])
        return _grain().MapDataset.concatenate(drawn) if drawn else rows

    def _by_length(self, epoch: int) -> np.ndarray:
        """The rows in batches of neighbours by length, drawn from `WINDOW` shuffled batches at a time; the batches are
        shuffled too. A function of (seed, epoch)."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.rows)) if self.shuffle else np.arange(len(self.rows))
        lengths, size = np.asarray(self.lengths), self.batch_size * collectives.world_size()
        windows = np.split(order, range(WINDOW * size, len(order), WINDOW * size))
        order = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
        whole, rest = np.split(order, [len(order) // size * size])
        batches = whole.reshape(-1, size)
        return np.concatenate([(rng.permutation(batches) if self.shuffle else batches).reshape(-1), rest])

    @property
    def _share(self) -> slice:
        size, end = collectives.world_size(), self.num_drawn
        return slice(collectives.rank(), end // size * size if self.drop_last else end, size)


@attrs.frozen
class _Ordered:
    """`rows` in another order."""

    rows: Sequence
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int):
        return self.rows[int(self.order[place])]


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def prefetched(batches: Iterator[dict]) -> Iterator[dict]:
    """`batches`, a few of which a thread prepares ahead from the first one on."""
    grain: Any = _grain()

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

    ahead = iter(grain.experimental.ThreadPrefetchIterDataset(Source(), prefetch_buffer_size=NUM_PREFETCHED))
    try:
        yield from ahead
    finally:
        ahead.close()  # some versions of grain leave the thread of an epoch that is not read to its end


def _grain() -> Any:
    """Import grain without its log message about JAX's profiler."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import grain
    finally:
        logger.setLevel(level)
    return grain


@attrs.frozen(kw_only=True)
class StreamLoader:
    """Full batches of `transform(row, rng)` from a stream: like `Loader`, but without a length.

    Order and `rng` are functions of (seed, epoch, rank, place in this process's epoch). `epoch(3, start=7)` yields
    batch 7 of epoch 3 exactly as the first time: the batches before it are made again and skipped.
    """

    rows: StreamRows
    transform: Callable[[dict, np.random.Generator], dict]
    batch_size: int
    seed: int = 0
    buffer_size: int = 1_000
    num_threads: int = 1
    collate: Callable[[dict], dict] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """The batches of an epoch from number `start` on. Raises `UserError` if too many rows are unusable."""
        return prefetched(islice(self._batches(epoch), start, None))

    def _batches(self, epoch: int) -> Iterator[dict]:
        examples = self._examples(epoch)
        while len(part := list(islice(examples, self.batch_size))) == self.batch_size:
            batch = {name: np.stack([example[name] for example in part]) for name in part[0]}
            yield batch if self.collate is None else self.collate(batch)

    def _examples(self, epoch: int) -> Iterator[dict]:
        rows = enumerate(self.rows.shuffled(_seed(self.seed, epoch), self.buffer_size))
        transform = lambda numbered: self._encoded(numbered[0], numbered[1], epoch)
        num_rows = num_bad = 0
        with ThreadPoolExecutor(self.num_threads) as pool:
            while part := list(islice(rows, self.batch_size)):
                examples = list(pool.map(transform, part))
                good = [example for example in examples if example is not None]
                num_rows, num_bad = num_rows + len(part), num_bad + len(part) - len(good)
                if num_bad > max(MIN_UNUSABLE, MAX_UNUSABLE * num_rows):
                    raise UserError(f"{num_bad} of {num_rows} rows lack picture or caption, more than one in a hundred")
                yield from good

    def _encoded(self, place: int, values: dict, epoch: int) -> dict | None:
        try:
            rng = np.random.default_rng([self.seed, epoch, collectives.rank(), place])
            return self.transform(self.rows.row(values), rng)
        except UnusableRow as error:
            say(f"skipped, {error}")
            return None
