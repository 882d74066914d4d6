"""CaptionData: a source of pictures with captions as a DataModule, ready for a Trainer."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import attrs
import numpy as np

from mlxmm.config import to_json
from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.loader import Loader, StreamLoader
from mlxmm.data.source_data import SourceData
from mlxmm.data.sources.rows import Rows, is_stream
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import random_square


class CaptionData(SourceData):
    """Batches of examples: `transform(row, caption)` makes an example of a row and one of its captions,
    `collate(batch)` completes a batch of them. Without `transform`, both are those of the module that is fitted.

    Training draws one caption a picture and epoch; validation and test take the first.
    """

    def __init__(
        self,
        source: CaptionSource,
        *,
        transform: Callable[[dict, str], dict] | None = None,
        collate: Callable[[dict], dict] | None = None,
    ):
        super().__init__(source)
        self.transform, self.collate = transform, collate
        self._by_module = transform is None
        self.batch_size = source.config.batch_size
        self._rows = dict(source.rows)

    def setup(self, stage):
        if self._by_module:
            module = self.trainer.module
            self.transform, self.collate = require_transform(module), getattr(module, "collate", None)

    @property
    def hparams(self) -> dict:
        """The settings that loggers write: which pictures, and how they become batches."""
        return to_json(self.source.config)

    @property
    def rows(self) -> Mapping[str, Rows]:
        """The rows of each split as they are now; `replace_rows` changes them."""
        return MappingProxyType(self._rows)

    def replace_rows(self, split: str, rows: Rows) -> None:
        """Take the examples of `split` from other rows, from the next epoch or validation on.

        Raises `UserError` where sources have weights and there are not as many training rows, in the same order.
        """
        num_rows = sum(part.num_rows for part in self.source.parts)
        if split == "train" and num_rows and len(rows) != num_rows:
            raise UserError(f"{len(rows)} training rows cannot replace {num_rows} of a weighted mixture, one for one")
        self._rows[split] = rows

    def train_dataloader(self):
        if is_stream(self.rows["train"]):
            return self._stream_loader()
        return self._loader("train", self._draw, shuffle=True, drop_last=True, parts=self.source.parts)

    def val_dataloader(self):
        return self._loader("val", self._first)

    def test_dataloader(self):
        return self._loader("test", self._first)

    def _loader(self, split: str, transform: Callable, **options) -> Loader:
        loader = Loader(
            rows=self.rows[split],
            transform=transform,
            batch_size=self.batch_size,
            seed=self.source.seed,
            num_threads=self.source.config.num_decoding_threads,
            collate=self.collate,
            **options,
        )
        share = loader.num_drawn // collectives.world_size()
        return attrs.evolve(loader, batch_size=max(1, min(self.batch_size, share)))

    def _stream_loader(self) -> StreamLoader:
        return StreamLoader(
            rows=self.rows["train"],
            transform=self._draw,
            batch_size=self.batch_size,
            seed=self.source.seed,
            buffer_size=self.source.config.shuffle_buffer,
            num_threads=self.source.config.num_decoding_threads,
            collate=self.collate,
        )

    def _draw(self, row: dict, rng: np.random.Generator) -> dict:
        caption = row["captions"][int(rng.integers(len(row["captions"])))]
        if self.source.config.random_crop:
            row = row | {"image": random_square(row["image"], rng)}
        return self.transform(row, caption)

    def _first(self, row: dict, rng: np.random.Generator) -> dict:
        return self.transform(row, row["captions"][0])


def require_transform(module) -> Callable[[dict, str], dict]:
    """The `transform` of a module. Raises `UserError` where it has none."""
    if not callable(getattr(module, "transform", None)):
        raise UserError(f"{type(module).__name__} has no transform(row, caption): give CaptionData one")
    return module.transform
