"""Pictures alone, with or without captions, from any source: what a captioning job reads."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
from PIL import Image

from mlxmm.data.caption_config import SHAPES, CaptionDataConfig
from mlxmm.data.sources.mixed import MixedRows
from mlxmm.data.sources.opening import unlisted_pictures
from mlxmm.data.sources.picture_files import file_of
from mlxmm.data.sources.row_splits import split_tables
from mlxmm.data.sources.rows import CaptionRows, Rows
from mlxmm.data.sources.shapes import ShapesGrammar
from mlxmm.data.sources.tables import (
    Columns,
    captions_in_cell,
    named_splits,
    open_tables,
    reading_errors,
    tell,
    with_files,
)
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import decode_image
from mlxmm.terminal import counted

ALL = "all"  # the name of all splits together
IDENTITY = {"file_name": ("file_name", "filename", "filepath"), "id": ("id", "item_key", "__key__"), "url": ("url",)}


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

    def identity(self, place: int) -> dict[str, str]:
        """What its source calls the picture: "file_name", "id" and "url", those that are known."""


@attrs.frozen
class TablePictures(Sequence):
    """The pictures in the rows `indices` of a `datasets.Dataset`."""

    table: Any
    indices: np.ndarray
    column: str
    folder: Path | None = None  # of the source, if it is one: files are named below it

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

    def identity(self, place: int) -> dict[str, str]:
        columns = [name for names in IDENTITY.values() for name in names if name in self.table.column_names]
        row = self.table.select_columns(columns)[int(self.indices[place])] if columns else {}
        found = {key: next((row[n] for n in names if row.get(n) is not None), None) for key, names in IDENTITY.items()}
        own = str(found["file_name"] or "")
        if not own or Path(own).is_absolute():
            found["file_name"] = self._below(own or (self._cell(place) or {}).get("path") or "")
        return {key: str(value) for key, value in found.items() if isinstance(value, str | int) and value != ""}

    def _below(self, path: str) -> str:
        """A file's path in the folder of the source; of another file its name alone."""
        name, parent = Path(path).name, Path(path).parent.resolve()  # the file itself may be a link to another folder
        is_below = self.folder is not None and parent.is_relative_to(self.folder.resolve())
        return (parent.relative_to(self.folder.resolve()) / name).as_posix() if name and is_below else name

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

    def identity(self, place: int) -> dict[str, str]:
        return {}


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

    def identity(self, place: int) -> dict[str, str]:
        pictures, own = self._find(place)
        return pictures.identity(own)

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
    return open_split(config, seed, split)[0]


def open_split(
    config: CaptionDataConfig, seed: int, split: str | None, *, only_missing: bool = False
) -> tuple[Pictures, str]:
    """The pictures of one split of a source with the split's name; of None, "all" where a source has no splits of its
    own, else "train", and which are left is printed.

    "all" has the files too that a folder's metadata do not name. With `only_missing` those that have a caption are
    left out. Raises `UserError` where the source, its picture column or the split is missing, or nothing is left; with
    `only_missing` also where there is no caption column.
    """
    source = config.only_source
    if source == SHAPES and only_missing:
        raise UserError(f"all pictures of {SHAPES} have captions: leave out --only-missing")
    if source == SHAPES:
        rows = ShapesGrammar(config.shapes, seed).rows(seed)
        return RowPictures(_named(rows, split or "train", source)), split or "train"
    if config.streaming:
        raise UserError("pictures of a stream have no places: leave out --data.streaming")
    caption = " ".join(config.caption_column) if only_missing else None
    columns = Columns(image=config.image_column, caption=caption, split=config.split_column)
    with reading_errors(source):
        tables = open_tables(source, columns, **config.which)
    chosen = split or (ALL if len(tables) == 1 and columns.split is None else "train")
    if chosen == ALL:
        table = _with_unlisted(_only(tables, source), Path(source), columns.image)
        indices = np.arange(len(table))
    else:
        splits = split_tables(tables, columns, seed)
        table, indices = _named(splits, chosen, source)
        if split is None:
            _report_left({name: len(rows) for name, (_, rows) in splits.items() if name != chosen}, chosen)
    if caption is not None:
        indices = _without_caption(table, indices, caption)
    if not len(indices):
        raise UserError(f"{source} has no pictures{' without a caption' * only_missing} in --split {chosen}")
    return TablePictures(table, indices, columns.image, Path(source) if Path(source).is_dir() else None), chosen


def _with_unlisted(table, folder: Path, column: str):
    """The table of a folder, with a row for each picture that its metadata do not name. A table that holds its pictures
    lists none of the files beside it."""
    if any((row[column] or {}).get("bytes") for row in table.select_columns([column])):
        return table
    if unlisted := unlisted_pictures(folder, [table], column):
        tell(f"captioned too: {counted(len(unlisted), 'picture')} that the metadata do not name")
    return with_files(table, unlisted, column) if unlisted else table


def _report_left(left: dict[str, int], chosen: str) -> None:
    if left := {name: number for name, number in left.items() if number}:
        num_each = ", ".join(f"{counted(number, 'picture')} of {name}" for name, number in left.items())
        tell(f"captions are written of {chosen}; left: {num_each} (--split {' or '.join(left)})")


def _without_caption(table, indices: np.ndarray, column: str) -> np.ndarray:
    """Those of `indices` whose rows have no caption in the `column`."""
    rows, kind = table.select_columns([column]).select(indices), table.features[column]
    return indices[np.array([not captions_in_cell(row[column], kind) for row in rows], dtype=bool)]


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
