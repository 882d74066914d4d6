"""Rows of pictures with captions from parquet files, image folders and the Hub. `datasets` is read here only.

A row is `{"image": PIL, "captions": [str], "id": str}`.
"""

import glob
import hashlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import numpy as np

from mlxmm.config import UserError
from mlxmm.data.images import SUFFIXES, UndecodableImage, decode_image

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
HELD_OUT = 0.05  # of the rows for each of val and test, where a source has no splits of its own
PACKED = (".parquet", ".zip", ".tar", ".gz")  # other files of a folder that may hold pictures
FOLDER = f"a folder holds {', '.join(SUFFIXES)}, and a metadata.jsonl or .csv with the columns file_name and caption"
MAX_UNUSABLE = 0.01  # of a split's rows: beyond it something is wrong with the source


@attrs.frozen(kw_only=True)
class Columns:
    """What a source calls its columns."""

    image: str
    caption: str
    split: str | None


@attrs.frozen
class CaptionRows(Sequence):
    """The rows `indices` of a `datasets.Dataset`, decoded when asked for."""

    table: object
    indices: np.ndarray
    columns: Columns

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict:
        index = int(self.indices[place])
        row = self.table[index]
        return {
            "image": decode_image(row[self.columns.image]),
            "captions": _captions(self._words(row[self.columns.caption]), index),
            "id": self.name(place),
        }

    def without_image(self, place: int) -> dict:
        """The row without its picture, which is not decoded."""
        index = int(self.indices[place])
        captions = self.table.select_columns([self.columns.caption])[index][self.columns.caption]
        return {"captions": _captions(captions, index), "id": self.name(place)}

    def fingerprint(self) -> bytes:
        """A checksum of the pictures, in their order: of their bytes, or of the files that they are in."""
        digest = hashlib.sha256()
        pictures = self.table.select_columns([self.columns.image])
        for index in self.indices:
            image = pictures[int(index)][self.columns.image]
            if image["bytes"] is not None:
                digest.update(hashlib.sha256(image["bytes"]).digest())
            else:
                stat = Path(image["path"]).stat()
                digest.update(f"{image['path']}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
        return digest.digest()

    def captions(self) -> list[str]:
        """Every caption, without touching a picture."""
        column = self.table.select_columns([self.columns.caption]).select(self.indices)
        rows = column[self.columns.caption]
        return [text for index, row in zip(self.indices, rows) for text in _captions(self._words(row), int(index))]

    def _words(self, value):
        """A caption column may hold numbers of classes, which `datasets` has names for."""
        return self.table.features[self.columns.caption].int2str(value) if isinstance(value, int) else value

    def name(self, place: int) -> str:
        """What a person finds the row by: its file where it has one, its number where not."""
        index = int(self.indices[place])
        image = self.table[index][self.columns.image]
        path = image.get("path") if isinstance(image, dict) else None
        return f"{path} (row {index})" if path else f"row {index}"

    def without_undecodable(self, num_threads: int) -> tuple["CaptionRows", list[str]]:
        """The rows whose pictures can be decoded, and the names of the others.

        Raises `UserError` that names the first five, where they are more than one in a hundred.
        """
        with ThreadPoolExecutor(num_threads) as pool:
            good = np.array(list(pool.map(self._is_decodable, range(len(self)))), dtype=bool)
        return self._only(good, "pictures cannot be decoded")

    def without_captionless(self) -> tuple["CaptionRows", list[str]]:
        """The rows that have a caption, and the names of the others. Raises as `without_undecodable` does."""
        column = self.table.select_columns([self.columns.caption]).select(self.indices)
        good = [bool(_texts(self._words(value))) for value in column[self.columns.caption]]
        return self._only(np.array(good, dtype=bool), "rows have no caption")

    def _only(self, good: np.ndarray, fault: str) -> tuple["CaptionRows", list[str]]:
        bad = np.flatnonzero(~good)
        names = (self.name(int(place)) for place in bad)
        if len(bad) > MAX_UNUSABLE * len(self):
            first = ", ".join(itertools.islice(names, 5))
            much = f"{len(bad)} of {len(self)} {fault}, more than one in a hundred"
            raise UserError(f"{much}; put them right or leave them out: {first}")
        return attrs.evolve(self, indices=self.indices[good]), list(names)

    def _is_decodable(self, place: int) -> bool:
        try:
            decode_image(self.table[int(self.indices[place])][self.columns.image])
            return True
        except UndecodableImage:
            return False


def open_rows(source: str, columns: Columns, *, revision: str | None, seed: int) -> dict[str, CaptionRows]:
    """The rows of `source`, by split: "train", "val", "test".

    `source` is a parquet file or glob, a folder of images with metadata.jsonl or .csv, or a data set on the Hub.
    Raises `UserError` where it, a column or a split is not there.
    """
    import datasets

    datasets.disable_progress_bars()
    if Path(source).is_dir() and not _has_files(Path(source), (*SUFFIXES, *PACKED)):
        raise UserError(f"{source} holds no pictures: {FOLDER}")
    tables = _load(source, revision)
    first = next(iter(tables.values()))
    for column in (columns.image, columns.caption, columns.split):
        if column is not None and column not in first.column_names:
            hint = f"; {FOLDER}" if Path(source).is_dir() else ""
            raise UserError(f"{source} has no column {column!r}; it has {', '.join(first.column_names)}{hint}")
    tables = {name: table.cast_column(columns.image, datasets.Image(decode=False)) for name, table in tables.items()}
    rows = {split: CaptionRows(*part, columns) for split, part in _split(tables, columns.split, seed).items()}
    if empty := [split for split in SPLITS if split not in rows or not len(rows[split])]:
        raise UserError(f"{source} has no rows for {', '.join(empty)}; its splits are {', '.join(tables)}")
    return rows


def unlisted_pictures(folder: Path, rows: dict[str, CaptionRows]) -> list[Path]:
    """The pictures in a folder of which its metadata say nothing: `datasets` passes over them."""
    pictures = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    listed = set()
    for part in rows.values() if pictures else ():
        images = part.table.select_columns([part.columns.image])[part.columns.image]
        listed |= {Path(image["path"]).resolve() for image in images if image["path"]}
    return sorted(path for path in pictures if path.resolve() not in listed)


def _has_files(folder: Path, suffixes: Sequence[str]) -> bool:
    return any(path.suffix.lower() in suffixes for path in folder.rglob("*"))


def _load(source: str, revision: str | None) -> dict:
    import datasets

    files = sorted(glob.glob(source)) if not Path(source).is_dir() else []
    try:
        if Path(source).is_dir():
            return datasets.load_dataset("imagefolder", data_dir=source)
        if files:
            return datasets.load_dataset("parquet", data_files=files)
        if source.endswith(".parquet") or source.count("/") != 1:
            raise UserError(f"{source} is not there: neither a parquet file, a glob, a folder nor a Hub id")
        return datasets.load_dataset(source, revision=revision)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        raise UserError(f"{source} cannot be read: {type(error).__name__}: {_first_line(error)}") from error


def _split(tables: dict, split_column: str | None, seed: int) -> dict[str, tuple]:
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


def _captions(value, index: int) -> list[str]:
    if texts := _texts(value):
        return texts
    raise UserError(f"row {index} has no caption")


def _texts(value) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value or ())
    return [text.strip() for text in texts if text and text.strip()]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
