"""Streams: training pictures that are read from their files, here or on the Hub, while training goes on.

A stream has no length and no tenth row. Rows are drawn from a buffer of those that follow each other in the files.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import attrs
import numpy as np

from mlxmm.config import UserError
from mlxmm.data.images import UndecodableImage
from mlxmm.data.loader import prefetched

MAX_UNDECODABLE = 0.01  # of the rows of an epoch so far: beyond it something is wrong with the source
FEWEST = 10  # pictures that cannot be decoded before their share counts


@attrs.frozen(kw_only=True)
class StreamRows:
    """The rows of a `datasets.IterableDataset`, which may be iterated again and again.

    `row(values)` makes a row of what the table gives, and raises `UndecodableImage`; `words(values)` gives its
    captions alone; `own(table)` is what this process has of a table.
    """

    table: object
    row: Callable[[dict], dict]
    words: Callable[[dict], list[str]]
    own: Callable[[object], object]

    def captions(self) -> Iterator[str]:
        """Every caption, in the order of the files."""
        return (caption for values in self.table for caption in self.words(values))

    def shuffled(self, seed: int, buffer_size: int) -> Iterator[dict]:
        """This process's rows, not decoded, in an order that is a function of `seed`."""
        return iter(self.own(self.table).shuffle(seed=seed, buffer_size=buffer_size))


@attrs.frozen(kw_only=True)
class StreamLoader:
    """Whole batches of `encode(row, rng)` from a stream, in the manner of `Loader`, but of unknown number.

    Order and `rng` are functions of (seed, epoch, place in this process's epoch). `epoch(3, start=7)` gives batch 7
    of epoch 3 as it was the first time: the batches before it are made again and left out.
    """

    rows: StreamRows
    encode: Callable[[dict, np.random.Generator], dict]
    batch_size: int
    seed: int = 0
    buffer_size: int = 1_000
    num_threads: int = 1
    complete_batch: Callable[[dict], dict] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict]:
        """The batches of an epoch from number `start` on. Raises `UserError` where too many pictures are broken."""
        return prefetched(islice(self._batches(epoch), start, None))

    def _batches(self, epoch: int) -> Iterator[dict]:
        examples = self._examples(epoch)
        while len(part := list(islice(examples, self.batch_size))) == self.batch_size:
            batch = {name: np.stack([example[name] for example in part]) for name in part[0]}
            yield batch if self.complete_batch is None else self.complete_batch(batch)

    def _examples(self, epoch: int) -> Iterator[dict]:
        [seed] = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        rows = enumerate(self.rows.shuffled(int(seed), self.buffer_size))
        encode = lambda numbered: self._encoded(*numbered, epoch)
        num_rows = num_bad = 0
        with ThreadPoolExecutor(self.num_threads) as pool:
            while part := list(islice(rows, self.batch_size)):
                examples = list(pool.map(encode, part))
                good = [example for example in examples if example is not None]
                num_rows, num_bad = num_rows + len(part), num_bad + len(part) - len(good)
                if num_bad > max(FEWEST, MAX_UNDECODABLE * num_rows):
                    raise UserError(f"{num_bad} of {num_rows} pictures cannot be decoded, more than one in a hundred")
                yield from good

    def _encoded(self, place: int, values: dict, epoch: int) -> dict | None:
        try:
            return self.encode(self.rows.row(values), np.random.default_rng([self.seed, epoch, place]))
        except UndecodableImage as error:
            print(f"skipped, cannot be decoded: {error}")
            return None
