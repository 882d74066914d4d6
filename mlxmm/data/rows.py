"""Rows of pictures with captions from parquet files, image folders and the Hub. `datasets` is read here only.

A row is `{"image": PIL, "captions": [str], "id": str}`.
"""

import contextlib
import glob
import hashlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import numpy as np

from mlxmm import distributed
from mlxmm.config import UserError
from mlxmm.data.images import UndecodableImage, decode_image
from mlxmm.data.stream import StreamRows

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
HELD_OUT = 0.05  # of the rows for each of val and test, where a source has no splits of its own
MAX_UNDECODABLE = 0.01  # of a split's rows: beyond it something is wrong with the source


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
            "captions": _captions(self._words(row[self.columns.caption]), f"row {index}"),
            "id": self.name(place),
        }

    def without_image(self, place: int) -> dict:
        """The row without its picture, which is not decoded."""
        index = int(self.indices[place])
        captions = self.table.select_columns([self.columns.caption])[index][self.columns.caption]
        return {"captions": _captions(self._words(captions), f"row {index}"), "id": self.name(place)}

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
        return [text for index, row in zip(self.indices, rows) for text in _captions(self._words(row), f"row {index}")]

    def first_of_each(self, column: str) -> "CaptionRows":
        """The first row of each value that `column` has. Raises `UserError` where there is no such column."""
        if column not in self.table.column_names:
            raise UserError(f"there is no column {column!r}; the columns are {', '.join(self.table.column_names)}")
        places: dict = {}
        for place, value in enumerate(self.table.select_columns([column]).select(self.indices)[column]):
            places.setdefault(value, place)
        return attrs.evolve(self, indices=self.indices[list(places.values())])

    def _words(self, value):
        return _words(value, self.table.features[self.columns.caption])

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
        bad = [self.name(int(place)) for place in np.flatnonzero(~good)]
        if len(bad) > MAX_UNDECODABLE * len(self):
            raise UserError(
                f"{len(bad)} of {len(self)} pictures cannot be decoded, more than one in a hundred: "
                + ", ".join(bad[:5])
            )
        return attrs.evolve(self, indices=self.indices[good]), bad

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
    with _readable(source):
        tables = _tables(source, columns, revision=revision)
    rows = {split: CaptionRows(*part, columns) for split, part in _split(tables, columns.split, seed).items()}
    _check_splits(source, [split for split in rows if len(rows[split])], tables)
    return rows


def open_stream(source: str, columns: Columns, *, revision: str | None, num_held_out: int) -> dict:
    """`StreamRows` of `source` for "train"; for "val" and "test" their first `num_held_out` rows, in memory.

    Raises `UserError` as `open_rows` does, and where `source` does not tell its splits apart.
    """
    with _readable(source):
        tables = _tables(source, columns, revision=revision, streaming=True)
        if columns.split is None and len(tables) == 1:
            raise UserError(f"a stream is not divided at random: {source} needs --data.split-column, or own splits")
        streams = {split: _stream(tables, columns, names) for split, names in SPLITS.items()}
        first = {split: list(streams[split].take(1 if split == "train" else num_held_out)) for split in streams}
        _check_splits(source, [split for split in first if first[split]], tables)
        rows = {split: _in_memory(streams[split], first[split], columns) for split in ("val", "test")}
        return {"train": _stream_rows(streams["train"], columns)} | rows


def _tables(source: str, columns: Columns, **how) -> dict:
    """The tables of `source` by its own names of splits, their pictures not decoded."""
    import datasets

    datasets.disable_progress_bars()
    tables = _load(source, **how)
    names = next(iter(tables.values())).column_names or []  # of some kinds of files a stream does not know them
    for column in (columns.image, columns.caption, columns.split):
        if column is not None and column not in names:
            raise UserError(f"{source} has no column {column!r}; it has {', '.join(names)}")
    if how.get("streaming"):  # pictures on the Hub are decoded before `cast_column` comes, unless told not to
        tables = {name: table.decode(False) for name, table in tables.items()}
    return {name: table.cast_column(columns.image, datasets.Image(decode=False)) for name, table in tables.items()}


def _load(source: str, *, revision: str | None, **how) -> dict:
    import datasets

    if Path(source).is_dir():
        files = {path.name for path in Path(source).rglob("*.parquet")} - {"metadata.parquet"}  # an image folder's own
        kind = "parquet" if files else "imagefolder"
        return datasets.load_dataset(kind, data_dir=source, **how)
    if files := sorted(glob.glob(source)):
        return datasets.load_dataset("parquet", data_files=files, **how)
    if source.endswith(".parquet") or source.count("/") != 1:
        raise UserError(f"{source} is not there: neither a parquet file, a glob, a folder nor a Hub id")
    return datasets.load_dataset(source, revision=revision, **how)


@contextlib.contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        raise UserError(f"{source} cannot be read: {type(error).__name__}: {_first_line(error)}") from error


def _check_splits(source: str, found: Collection[str], tables: dict) -> None:
    if empty := [split for split in SPLITS if split not in found]:
        raise UserError(f"{source} has no rows for {', '.join(empty)}; its splits are {', '.join(tables)}")


def _stream(tables: dict, columns: Columns, names: Sequence[str]):
    """What of streamed tables belongs to the split of these `names`: none of its rows where there is no such split."""
    table = next((tables[name] for name in names if name in tables), None)
    if columns.split is None:
        return table if table is not None else next(iter(tables.values())).take(0)
    return next(iter(tables.values())).filter(lambda label: label in names, input_columns=[columns.split])


def _in_memory(table, rows: list[dict], columns: Columns) -> CaptionRows:
    import datasets

    rows = [values | {columns.image: _with_bytes(values[columns.image])} for values in rows]
    return CaptionRows(datasets.Dataset.from_list(rows, features=table.features), np.arange(len(rows)), columns)


def _stream_rows(table, columns: Columns) -> StreamRows:
    from datasets.distributed import split_dataset_by_node

    kind = table.features[columns.caption]
    name = lambda values: (values[columns.image] or {}).get("path") or f"the picture of {values[columns.caption]!r}"
    words = lambda values: _captions(_words(values[columns.caption], kind), name(values))

    def row(values: dict) -> dict:
        try:
            image = decode_image(_with_bytes(values[columns.image]))
        except UndecodableImage as error:
            raise UndecodableImage(f"{name(values)}: {error}") from None
        return {"image": image, "captions": words(values), "id": name(values)}

    own = lambda table: split_dataset_by_node(table, distributed.rank(), distributed.world_size())
    return StreamRows(table=table, row=row, words=words, own=own)


def _with_bytes(image: dict | None) -> dict | None:
    """A picture that is a file elsewhere, with what that file holds."""
    if not image or image["bytes"] is not None or "://" not in (image["path"] or ""):
        return image
    from datasets.utils.file_utils import xopen

    with xopen(image["path"], "rb") as file:
        return image | {"bytes": file.read()}


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


def _words(value, kind):
    """A caption column may hold numbers of classes, which `datasets` has names for."""
    return kind.int2str(value) if isinstance(value, int) else value


def _captions(value, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value or ())
    texts = [text.strip() for text in texts if text and text.strip()]
    if not texts:
        raise UserError(f"{name} has no caption")
    return texts


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
