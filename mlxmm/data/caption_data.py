"""CaptionData: a source of pictures with captions as a DataModule, ready for a Trainer."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from mlxmm.config import to_json
from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.loader import Loader, StreamLoader
from mlxmm.data.sources.rows import Rows, is_stream
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import random_square
from mlxmm.training.datamodule import DataModule


class CaptionData(DataModule):
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
        self.source, self.transform, self.collate = source, transform, collate
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
        """Take the examples of `split` from other rows, from the next epoch or validation on."""
        self._rows[split] = rows

    def train_dataloader(self):
        if is_stream(self.rows["train"]):
            return self._stream_loader()
        return self._loader("train", self._draw, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return self._loader("val", self._first)

    def test_dataloader(self):
        return self._loader("test", self._first)

    def _loader(self, split: str, transform: Callable, **options) -> Loader:
        rows = self.rows[split]
        share = len(rows) // collectives.world_size()
        return Loader(
            rows=rows,
            transform=transform,
            batch_size=max(1, min(self.batch_size, share)),
            seed=self.source.seed,
            num_threads=self.source.config.num_decoding_threads,
            collate=self.collate,
            **options,
        )

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
