"""Rows of images with captions: what every source keeps, and those of parquet files, image folders and the Hub.

A row is `{"image": PIL, "captions": [str], "id": str}`.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np

from mlxmm.data.sources.decodable import undecodable_places
from mlxmm.data.sources.tables import SPLITS, Columns, captions_in_cell, check_splits, open_tables, reading_errors
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import SUFFIXES, UndecodableImage, decode_image

HELD_OUT = 0.05  # fraction of the rows for each of val and test, if a source has no splits
MAX_UNUSABLE = 0.01  # fraction of a split's rows: with more, something is wrong with the source


class Rows(Protocol):
    """The rows of a split, as every source has them: a sequence whose images are decoded when they are asked for.

    Threads call `__getitem__`, so it must not use MLX, whose random key belongs to a thread.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> dict:
        """The row `{"image": PIL, "captions": [str], "id": str}`."""

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""

    def captions(self) -> Iterable[str]:
        """Every caption, without touching an image."""

    def name(self, place: int) -> str:
        """What a person finds the row by."""

    def fingerprint(self) -> bytes:
        """A checksum of the images in their order: what is cached of them is found by it."""


def is_stream(rows) -> bool:
    """Whether rows have neither a length nor numbers, as those of `StreamRows`."""
    return not hasattr(rows, "__len__")


@attrs.frozen
class CaptionRows(Sequence):
    """The rows `indices` of a `datasets.Dataset`, decoded when they are asked for."""

    table: Any  # a `datasets.Dataset`
    indices: np.ndarray
    columns: Columns

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict:
        index = int(self.indices[place])
        row = self.table[index]
        return {
            "image": decode_image(row[self.columns.image]),
            "captions": self._captions(row[self.columns.caption], index),
            "id": self.name(place),
        }

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""
        index = int(self.indices[place])
        captions = self.table.select_columns([self.columns.caption])[index][self.columns.caption]
        return {"captions": self._captions(captions, index), "id": self.name(place)}

    def fingerprint(self) -> bytes:
        """A checksum of the images in their order: of their bytes, or of name, size and time of their files."""
        digest = hashlib.sha256()
        pictures = self.table.select_columns([self.columns.image])
        for index in self.indices:
            digest.update(_identity(pictures[int(index)][self.columns.image]))
        return digest.digest()

    def captions(self) -> list[str]:
        """Every caption, without touching an image."""
        column = self.table.select_columns([self.columns.caption]).select(self.indices)
        rows = column[self.columns.caption]
        return [text for index, row in zip(self.indices, rows) for text in self._captions(row, index)]

    def first_of_each(self, column: str) -> "CaptionRows":
        """The first row of each value of `column`. Raises `UserError` if there is no such column."""
        if column not in self.table.column_names:
            raise UserError(f"there is no column {column!r}; the columns are {', '.join(self.table.column_names)}")
        places: dict = {}
        for place, value in enumerate(self.table.select_columns([column]).select(self.indices)[column]):
            if isinstance(value, list | dict):
                raise UserError(f"column {column!r} must hold classes; it holds {value!r:.60}")
            places.setdefault(value, place)
        return attrs.evolve(self, indices=self.indices[list(places.values())])

    def _captions(self, value, index: int) -> list[str]:
        if texts := self._texts(value):
            return texts
        raise UserError(f"row {index} has no caption")

    def _texts(self, value) -> list[str]:
        return captions_in_cell(value, self.table.features[self.columns.caption])

    def name(self, place: int) -> str:
        """What a person finds the row by: its file, if it has one, and its number."""
        index = int(self.indices[place])
        image = self.table[index][self.columns.image]
        path = image.get("path") if isinstance(image, dict) else None
        return f"{path} (row {index})" if path else f"row {index}"

    def without_undecodable(self, num_threads: int) -> tuple["CaptionRows", list[str]]:
        """The rows whose images can be decoded, and the names of the others. A collective call.

        Raises `UserError` that names the first five, if they are more than one in a hundred.
        """
        return self._without(undecodable_places(self, num_threads), "pictures cannot be decoded")

    def without_captionless(self) -> tuple["CaptionRows", list[str]]:
        """The rows that have a caption, and the names of the others. Raises as `without_undecodable` does."""
        column = self.table.select_columns([self.columns.caption]).select(self.indices)
        bad = [place for place, value in enumerate(column[self.columns.caption]) if not self._texts(value)]
        return self._without(bad, "rows have no caption")

    def _without(self, bad: Sequence[int], fault: str) -> tuple["CaptionRows", list[str]]:
        names = map(self.name, bad)
        if len(bad) > MAX_UNUSABLE * len(self):
            first = ", ".join(itertools.islice(names, 5))
            much = f"{len(bad)} of {len(self)} {fault}, more than one in a hundred"
            raise UserError(f"{much}; fix them or leave them out: {first}")
        return attrs.evolve(self, indices=np.delete(self.indices, bad)), list(names)

    def is_decodable(self, place: int) -> bool:
        """Whether the image at `place` can be decoded."""
        try:
            decode_image(self.table[int(self.indices[place])][self.columns.image])
            return True
        except UndecodableImage:
            return False


def _identity(image: dict | None) -> bytes:
    """What tells the image of a cell from others; a cell may be empty, and its file missing."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        return b"no image\n"
    if image["bytes"] is not None:
        return hashlib.sha256(image["bytes"]).digest()
    try:
        stat = Path(image["path"]).stat()
    except OSError:
        return f"{image['path']}: no file\n".encode()
    return f"{image['path']}:{stat.st_size}:{stat.st_mtime_ns}\n".encode()


def open_rows(
    source: str, columns: Columns, *, revision: str | None, seed: int, config_name: str | None = None
) -> dict[str, CaptionRows]:
    """The rows of `source`, by split: "train", "val", "test".

    `source` is a parquet file or glob, a folder of images with metadata.jsonl or .csv, or a data set on the Hub.
    Raises `UserError` if it, a column or a split does not exist.
    """
    with reading_errors(source):
        tables = open_tables(source, columns, revision=revision, config_name=config_name)
    parts = split_tables(tables, columns.split, seed)
    rows = {split: CaptionRows(table, indices, columns) for split, (table, indices) in parts.items()}
    check_splits(source, [split for split in rows if len(rows[split])], tables)
    return rows


def unlisted_pictures(folder: Path, rows: dict[str, CaptionRows]) -> list[Path]:
    """The images in a folder that its metadata do not name: `datasets` ignores them."""
    pictures = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    listed = set()
    for part in rows.values() if pictures else ():
        images = part.table.select_columns([part.columns.image])[part.columns.image]
        listed |= {Path(image["path"]).resolve() for image in images if image["path"]}
    return sorted(path for path in pictures if path.resolve() not in listed)


def split_tables(tables: dict, split_column: str | None, seed: int) -> dict[str, tuple]:
    """(table, indices) of each of our splits: by a column, by the source's own splits, or at random."""
    if split_column is None and len(tables) > 1:
        return {
            split: (tables[name], np.arange(len(tables[name])))
            for split, names in SPLITS.items()
            for name in names
            if name in tables
        }
    table = next(iter(tables.values()))
    if split_column is not None:
        labels = np.array(table[split_column])
        return {split: (table, np.flatnonzero(np.isin(labels, names))) for split, names in SPLITS.items()}
    order = np.random.default_rng(seed).permutation(len(table))
    num_held_out = max(1, int(HELD_OUT * len(table)))
    val, test, train = np.split(order, [num_held_out, 2 * num_held_out])
    return {"train": (table, np.sort(train)), "val": (table, val), "test": (table, test)}
