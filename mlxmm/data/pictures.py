"""Pictures alone, with or without captions, from any source: what a captioning job reads."""

import hashlib
import io
import os
from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import numpy as np
from PIL import Image

from mlxmm.data.caption_config import SHAPES, CaptionDataConfig
from mlxmm.data.sources.mixed import MixedRows
from mlxmm.data.sources.picture_files import file_of
from mlxmm.data.sources.rows import CaptionRows, Rows, split_tables
from mlxmm.data.sources.shapes import ShapesGrammar
from mlxmm.data.sources.tables import Columns, named_splits, open_tables, reading_errors
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import decode_image

ALL = "all"  # the name of all splits together


class Pictures(Protocol):
    """Pictures by their places. Threads may read them."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> Image.Image:
        """The picture, RGB and upright. Raises `UndecodableImage`."""

    def file(self, place: int) -> bytes:
        """The bytes of the picture's file; of a drawn picture, of a PNG file. Empty if there is none."""

    def sha256(self, place: int) -> str:
        """The SHA-256 of `file`, in hexadecimal."""

    def name(self, place: int) -> str:
        """What a person finds the picture by."""


@attrs.frozen
class TablePictures(Sequence):
    """The pictures in the rows `indices` of a `datasets.Dataset`."""

    table: Any
    indices: np.ndarray
    column: str

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Image.Image:
        return decode_image(self._cell(place))

    def file(self, place: int) -> bytes:
        return file_of(self._cell(place))

    def sha256(self, place: int) -> str:
        return hashlib.sha256(self.file(place) or self.name(place).encode()).hexdigest()

    def name(self, place: int) -> str:
        index = int(self.indices[place])
        path = (self._cell(place) or {}).get("path")
        return f"{path} (row {index})" if path else f"row {index}"

    def _cell(self, place: int) -> dict | None:
        return self.table[int(self.indices[place])][self.column]


@attrs.frozen
class RowPictures(Sequence):
    """The pictures of rows that have no files: of drawn scenes."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Image.Image:
        return self.rows[place]["image"]

    def file(self, place: int) -> bytes:
        buffer = io.BytesIO()
        self[place].save(buffer, format="PNG")
        return buffer.getvalue()

    def sha256(self, place: int) -> str:
        return hashlib.sha256(self.file(place)).hexdigest()

    def name(self, place: int) -> str:
        return self.rows.name(place)


@attrs.frozen
class MixedPictures(Sequence):
    """The pictures of a mixture, each as its source has it."""

    rows: MixedRows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Image.Image:
        pictures, own = self._find(place)
        return pictures[own]

    def file(self, place: int) -> bytes:
        pictures, own = self._find(place)
        return pictures.file(own)

    def sha256(self, place: int) -> str:
        pictures, own = self._find(place)
        return pictures.sha256(own)

    def name(self, place: int) -> str:
        return self.rows.name(place)

    def _find(self, place: int) -> tuple[Pictures, int]:
        rows, own = self.rows.find(place)
        return pictures_of(rows), own


def pictures_of(rows: Rows) -> Pictures:
    """The pictures of rows with captions."""
    if isinstance(rows, MixedRows):
        return MixedPictures(rows)
    if isinstance(rows, CaptionRows):
        return TablePictures(rows.table, rows.indices, rows.columns.image)
    return RowPictures(rows)


def open_pictures(config: CaptionDataConfig, seed: int, split: str) -> Pictures:
    """The pictures of one split of a source, or of "all". A caption column is not needed.

    Raises `UserError` where the source, its picture column or the split is missing.
    """
    source = config.only_source
    if source == SHAPES:
        return RowPictures(_named(ShapesGrammar(config.shapes, seed).rows(seed), split, source))
    if config.streaming:
        raise UserError("pictures of a stream have no places: leave out --data.streaming")
    columns = Columns(image=config.image_column, caption=None, split=config.split_column)
    with reading_errors(source):
        tables = open_tables(source, columns, **config.which)
    if split == ALL:
        table = _only(tables, source)
        return TablePictures(table, np.arange(len(table)), columns.image)
    table, indices = _named(split_tables(tables, columns.split, seed), split, source)
    if not len(indices):
        raise UserError(f"{source} has no pictures in --split {split}")
    return TablePictures(table, indices, columns.image)


def unlabelled_pictures(source: str, image_column: str) -> Pictures:
    """All pictures of a source; of one that has splits, those of training. Raises `UserError` as `open_pictures`."""
    source, columns = os.path.expanduser(source), Columns(image=image_column, caption=None, split=None)
    with reading_errors(source):
        tables = open_tables(source, columns, revision=None, config_name=None)
    table = next(iter(tables.values())) if len(tables) == 1 else _named(named_splits(tables), "train", source)
    return TablePictures(table, np.arange(len(table)), columns.image)


def _named(splits: dict, split: str, source: str):
    if split not in splits:
        raise UserError(f"--split {split}: {source} has {', '.join(splits)}")
    return splits[split]


def _only(tables: dict, source: str):
    if len(tables) > 1:
        raise UserError(f"--split all: {source} has {', '.join(tables)}; name one of train, val and test")
    return next(iter(tables.values()))
