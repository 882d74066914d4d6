"""Rows of images with captions: what every source keeps, and those of parquet files, image folders and the Hub.

A row is `{"image": PIL, "captions": [str], "id": str}`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np

from mlxmm.data.sources.decodable import undecodable_places
from mlxmm.data.sources.formats import RANDOM, SPLIT_OF, SPLITS, name_of_label, split_of_label
from mlxmm.data.sources.joined import Join
from mlxmm.data.sources.picture_files import num_bytes_of
from mlxmm.data.sources.tables import (
    Columns,
    captions_in_row,
    check_splits,
    column_names,
    concatenated,
    named_splits,
    open_tables,
    reading_errors,
    report_restval,
    tell,
)
from mlxmm.data.sources.twins import content, grouped, picture_numbers
from mlxmm.data.sources.where import Condition
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import SUFFIXES, UndecodableImage, decode_image

HELD_OUT = 0.05  # fraction of the rows for each of val and test, if a source has no splits
NOT_UNASKED = f", which are not trained on unasked: --data.split-column {RANDOM} divides all rows anew"
MAX_UNUSABLE = 0.01  # fraction of a source's rows: with more, something is wrong with it


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
            "captions": self._captions(row, index),
            "id": self.name(place),
        }

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""
        index = int(self.indices[place])
        row = self.table.select_columns(self.columns.of_captions)[index]
        return {"captions": self._captions(row, index), "id": self.name(place)}

    def fingerprint(self) -> bytes:
        """A checksum of the images in their order: of their bytes, or of name, size and time of their files."""
        digest = hashlib.sha256()
        pictures = self.table.select_columns([self.columns.image])
        for index in self.indices:
            digest.update(_identity(pictures[int(index)][self.columns.image]))
        return digest.digest()

    def checksum(self):
        """A SHA-256 of images and captions in their order, the same wherever their files lie: of files that are named
        alone, their sizes count."""
        digest = hashlib.sha256()
        for values in self._values([self.columns.image, *self.columns.of_captions]):
            texts = self._texts(values)
            digest.update(_content(values[self.columns.image]) + json.dumps(texts).encode())
        return digest

    def captions(self) -> list[str]:
        """Every caption, without touching an image."""
        rows = zip(self.indices, self._values(self.columns.of_captions))
        return [text for index, row in rows for text in self._captions(row, index)]

    def caption_lists(self) -> list[list[str]]:
        """The captions of each row; none of a row without."""
        return [self._texts(values) for values in self._values(self.columns.of_captions)]

    def cells(self) -> Sequence[dict | None]:
        """The pictures as the table has them: {"bytes", "path"}."""
        return self.table.select_columns([self.columns.image]).select(self.indices)[self.columns.image]

    def where(self, conditions: Sequence[Condition]) -> tuple["CaptionRows", dict[str, int]]:
        """The rows, and of each the captions, that meet those of `conditions` that are on a column of this table; and
        how many rows each of these left out. Raises `UserError` where a condition does not fit its column."""
        rows, left_out = self, {}
        for condition in conditions:
            if condition.column in self.table.column_names:
                meeting = rows._where(condition.typed(self.table.features[condition.column]))
                left_out[str(condition)] = len(rows) - len(meeting)
                rows = meeting
        return rows, left_out

    def _where(self, condition: Condition) -> "CaptionRows":
        columns = attrs.evolve(self.columns, conditions=(*self.columns.conditions, condition))
        kept = [columns.keep(values) for values in self._values(columns.of_captions)]
        return attrs.evolve(self, columns=columns, indices=self.indices[np.array(kept, dtype=bool)])

    def caption_facts(self, columns: Sequence[str]) -> Counter:
        """How many captions have each combination of values in `columns`; empty if there is no such column."""
        facts: Counter = Counter()
        for values in self._values([*self.columns.of_captions, *columns]) if self._has(columns) else ():
            met = self.columns.met(values)
            cells = (values[name] if isinstance(values[name], list) else [values[name]] * len(met) for name in columns)
            facts.update(fact for fact, is_met in zip(zip(*cells), met) if is_met)
        return facts

    def _has(self, columns: Sequence[str]) -> bool:
        return set(columns) <= set(self.table.column_names)

    def _values(self, columns: Sequence[str]) -> Iterator[dict]:
        """The values in `columns`, row by row."""
        names = list(dict.fromkeys(columns))
        table = self.table.select_columns(names).select(self.indices)
        return (dict(zip(names, row)) for row in zip(*(table[name] for name in names)))

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

    def _captions(self, values: dict, index: int) -> list[str]:
        if texts := self._texts(values):
            return texts
        raise UserError(f"row {index} has no caption")

    def _texts(self, values: dict) -> list[str]:
        return captions_in_row(values, self.columns, self.table.features)

    def name(self, place: int) -> str:
        """What a person finds the row by: its file, if it has one, and its number."""
        index = int(self.indices[place])
        image = self.table[index][self.columns.image]
        path = image.get("path") if isinstance(image, dict) else None
        return f"{path} (row {index})" if path else f"row {index}"

    def without_undecodable(self, num_threads: int) -> tuple["CaptionRows", list[str]]:
        """The rows whose images can be decoded, and the names of the others. A collective call."""
        return self._without(undecodable_places(self, num_threads), self.name_of_broken)

    def without_captionless(self) -> tuple["CaptionRows", list[str]]:
        """The rows that have a caption, and the names of the others."""
        rows = self._values(self.columns.of_captions)
        return self._without([place for place, values in enumerate(rows) if not self._texts(values)])

    def _without(self, places: Sequence[int], name=None) -> tuple["CaptionRows", list[str]]:
        return attrs.evolve(self, indices=np.delete(self.indices, places)), list(map(name or self.name, places))

    def name_of_broken(self, place: int) -> str:
        """The name of a row whose picture cannot be decoded, and whether that is because its file is not there."""
        image = self.table[int(self.indices[place])][self.columns.image] or {}
        is_absent = image.get("path") and image.get("bytes") is None and not os.path.exists(image["path"])
        return f"{self.name(place)}, no such file" if is_absent else self.name(place)

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
    if (digest := content(image)) is not None:
        return digest
    try:
        stat = Path(image["path"]).stat()
    except OSError:
        return f"{image['path']}: no file\n".encode()
    return f"{image['path']}:{stat.st_size}:{stat.st_mtime_ns}\n".encode()


def _content(image: dict) -> bytes:
    """What tells an image from others, on any machine."""
    if (digest := content(image)) is not None:
        return digest
    return f"{Path(image['path']).name}:{num_bytes_of(image)}\n".encode()


def open_rows(
    source: str,
    columns: Columns,
    *,
    revision: str | None,
    seed: int,
    config_name: str | None = None,
    image_folder: str | None = None,
    join: Join | None = None,
    to_train: bool = True,
) -> dict[str, CaptionRows]:
    """The rows of `source`, by split: "train", "val", "test"; unless it is `to_train`, of those that it has.

    `source` is a path that `formats.py` reads, or a data set on the Hub. With `join` its captions are from elsewhere.
    Raises `UserError` if it, a column or a split does not exist.
    """
    tables = _joined_tables(
        source, columns, join, revision=revision, config_name=config_name, image_folder=image_folder
    )
    parts = split_tables(tables, columns.split, seed)
    rows = {split: CaptionRows(table, indices, columns) for split, (table, indices) in parts.items()}
    rows = {split: part for split, part in rows.items() if len(part)}
    column = None if columns.split == RANDOM else columns.split
    names = tables if column is None else _labels(concatenated(list(tables.values())), column)
    check_splits(source, rows, names, column, to_train=to_train, hint=NOT_UNASKED)
    return grouped(source, rows)


def open_training_rows(
    source: str,
    columns: Columns,
    *,
    revision: str | None,
    seed: int,
    config_name: str | None = None,
    image_folder: str | None = None,
    join: Join | None = None,
) -> CaptionRows:
    """The training rows of `source`; all of its rows, if it has no splits. It need not have the split column.

    Raises `UserError` as `open_rows` does, and if there are none.
    """
    which = {"revision": revision, "config_name": config_name, "image_folder": image_folder}
    tables = _joined_tables(source, attrs.evolve(columns, split=None), join, **which)
    if columns.split not in [RANDOM, *column_names(tables)]:
        columns = attrs.evolve(columns, split=None)
    if columns.split == RANDOM or columns.split is None and not _has_splits(tables):
        table = concatenated(list(tables.values()))
        parts = {"train": (table, np.arange(len(table)))}
    else:
        parts = split_tables(tables, columns.split, seed)
    table, indices = parts.get("train", (None, ()))
    if not len(indices):
        raise UserError(f"{source} has no rows for train; its splits are {', '.join(tables)}{NOT_UNASKED}")
    return grouped(source, {"train": CaptionRows(table, indices, columns)})["train"]


def _joined_tables(source: str, columns: Columns, join: Join | None, **which) -> dict:
    """The tables of a source, with captions of its own or from elsewhere."""
    with reading_errors(source):
        tables = open_tables(source, attrs.evolve(columns, caption=None) if join else columns, **which)
    return join(source, tables, columns) if join else tables


def unlisted_pictures(folder: Path, tables: Sequence, column: str) -> list[Path]:
    """The images in a folder that its metadata do not name: `datasets` ignores them."""
    pictures = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    listed = set()
    for table in tables if pictures else ():
        images = table.select_columns([column])[column]
        paths = [image["path"] for image in images if image and image["path"]]
        listed |= {os.path.realpath(path) for path in paths if os.path.lexists(path)}
    return sorted(path for path in pictures if os.path.realpath(path) not in listed)


def split_tables(tables: dict, split_column: str | None, seed: int) -> dict[str, tuple]:
    """(table, indices) of each of our splits: by a column, by the source's own splits, or at random."""
    if split_column is None and _has_splits(tables):
        return {split: (table, np.arange(len(table))) for split, table in named_splits(tables).items()}
    table = concatenated(list(tables.values()))
    by_column = split_column not in (None, RANDOM)
    parts = _rows_by_label(table, split_column) if by_column else _random_split(table, seed)
    return {split: (table, rows) for split, rows in parts.items()}


def _has_splits(tables: dict) -> bool:
    """Whether a source says which rows are for what: one table says so if it is for evaluation."""
    return len(tables) > 1 or SPLIT_OF.get(next(iter(tables))) in ("val", "test")


def _rows_by_label(table, column: str) -> dict[str, np.ndarray]:
    """The rows of each split that a column names. Labels that name none are printed, with their number."""
    labels = [name_of_label(label, table.features[column]) for label in table[column][:]]
    if any(isinstance(label, list | dict) for label in labels):
        report_labels(column, labels, num_named=0)
    splits = np.array([split_of_label(label) or "" for label in labels])
    report_labels(column, [label for label, split in zip(labels, splits) if not split], num_named=sum(splits != ""))
    report_restval(labels)
    return {split: np.flatnonzero(splits == split) for split in SPLITS}


def _labels(table, column: str) -> list:
    """The different labels in a column, as people read them."""
    return [name_of_label(label, table.features[column]) for label in table.unique(column)]


def report_labels(column: str, unknown: Sequence, *, num_named: int) -> None:
    """Print the labels of rows that name no split, with their number. Raises `UserError` if all are such."""
    counts = Counter(str(label) for label in unknown).most_common(5)
    shown = ", ".join(f"{label!r:.60} ({number} rows)" for label, number in counts)
    if unknown and not num_named:
        raise UserError(f"column {column!r} must say train, val or test; it holds {shown}")
    if unknown:
        tell(f"left out, as column {column!r} says neither train, val nor test: {shown}")


def _random_split(table, seed: int) -> dict[str, np.ndarray]:
    """Rows of each split, drawn by picture: a picture with several rows is on one side."""
    pictures = picture_numbers(_picture_cells(table))
    num_pictures = int(pictures.max(initial=-1)) + 1
    if num_pictures < 3:  # which cannot be divided
        pictures, num_pictures = np.arange(len(table)), len(table)
    order = np.random.default_rng(seed).permutation(num_pictures)
    num_held_out = max(1, int(HELD_OUT * num_pictures))
    val, test, train = np.split(order, [num_held_out, 2 * num_held_out])
    if num_pictures == len(table):
        return {"train": np.sort(train), "val": val, "test": test}
    parts = {"train": train, "val": val, "test": test}
    return {split: np.flatnonzero(np.isin(pictures, own)) for split, own in parts.items()}


def _picture_cells(table) -> Sequence:
    name = next((name for name, kind in table.features.items() if type(kind).__name__ == "Image"), None)
    return table.select_columns([name])[name] if name else range(len(table))
