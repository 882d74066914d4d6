"""Streams: training rows that are read from local files or from the Hub during training.

A stream has no length and no random access. Rows are shuffled within a buffer of consecutive rows of the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import attrs
import numpy as np

from mlxmm.data.sources.formats import RANDOM, SPLIT_OF, SPLITS, name_of_label, split_of_label
from mlxmm.data.sources.row_splits import report_labels
from mlxmm.data.sources.rows import CaptionRows
from mlxmm.data.sources.tables import (
    Columns,
    captions_in_row,
    check_splits,
    column_names,
    concatenated,
    in_memory,
    named_splits,
    open_tables,
    reading_errors,
    with_bytes,
)
from mlxmm.data.sources.twins import MAX_SHOWN, grouped, picture_key
from mlxmm.data.sources.where import Condition
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import UndecodableImage, decode_image
from mlxmm.terminal import say

MIN_UNUSABLE = 10  # unusable rows that are always tolerated, however few rows were read


@attrs.frozen
class StreamRows:
    """The rows of a `datasets.IterableDataset` of `source`, which can be iterated repeatedly.

    Iterating raises `UserError` if its files cannot be read. `held_out` says of pictures in other splits in which.
    """

    source: str
    table: Any  # a `datasets.IterableDataset`
    columns: Columns
    held_out: Mapping[Any, str] = attrs.field(factory=dict)
    _named: set = attrs.field(factory=set, init=False, eq=False)  # pictures of `held_out` that were met and named

    def captions(self) -> Iterator[str]:
        """Every caption, in the order of the files."""
        with reading_errors(self.source):
            for values in self.table.select_columns(self.columns.of_captions):
                yield from self._captions(values)

    def shuffled(self, seed: int, buffer_size: int) -> Iterator[dict]:
        """The raw rows of this process, in an order that is a function of `seed`."""
        with reading_errors(self.source):
            rows = self.table.shuffle(seed=seed, buffer_size=buffer_size)
            # Every n-th row: `datasets` itself would split by files, however unequal they are.
            yield from islice(rows, collectives.rank(), None, collectives.world_size())

    def row(self, values: dict) -> dict:
        """The row made of the raw `values` of a file. Raises `UnusableRow`."""
        image, captions = values[self.columns.image], self._captions(values)
        name = (image or {}).get("path") or f"the picture of {captions}"
        if not captions:
            raise UnusableRow(f"has no caption: {name}")
        with reading_errors(self.source):
            image = with_bytes(image, self.source)
        self._report_held_out(image, name)
        try:
            return {"image": decode_image(image), "captions": captions, "id": name}
        except UndecodableImage as error:
            raise UnusableRow(f"cannot be decoded: {name}: {error}") from None

    def _report_held_out(self, image: dict | None, name: str) -> None:
        """Name a picture that is in another split too, the first time that it is met; the first few of them."""
        if not self.held_out:
            return
        split = self.held_out.get(key := picture_key(image))
        if split and key not in self._named and len(self._named) < MAX_SHOWN:
            self._named.add(key)
            say(f"{name} of {self.source} is in train and in {split}: what is measured on it is remembered")

    def _captions(self, values: dict) -> list[str]:
        return captions_in_row(values, self.columns, self.table.features[self.columns.caption])


class UnusableRow(Exception):
    """A row that training skips; the message says why."""


def open_stream(
    source: str,
    columns: Columns,
    *,
    revision: str | None,
    num_held_out: int,
    config_name: str | None = None,
    image_folder: str | None = None,
    conditions: Sequence[Condition] = (),
    to_train: bool = True,
) -> dict:
    """`StreamRows` of `source` for "train"; for "val" and "test" their first `num_held_out` rows, in memory. Unless it
    is `to_train`, the splits that it has.

    Rows that do not meet the `conditions` on columns of this source are passed over while it is read.

    Raises `UserError` as `open_rows` does, and if `source` has neither splits nor a split column.
    """
    which = {"revision": revision, "config_name": config_name, "image_folder": image_folder}
    with reading_errors(source):
        tables = open_tables(source, columns, streaming=True, **which)
        columns, tables = _where(conditions, columns, tables)
        is_one = len(tables) == 1 and SPLIT_OF.get(next(iter(tables))) not in ("val", "test")
        if columns.split == RANDOM or columns.split is None and is_one:
            raise UserError(f"a stream cannot be split at random: {source} needs --data.split-column, or own splits")
        most = {"train": 1, "val": num_held_out, "test": num_held_out}
        if columns.split is None:
            named = named_splits(tables)
            first = {split: list(table.take(most[split])) for split, table in named.items()}
        else:
            table = concatenated(list(tables.values()))
            kind = table.features[columns.split]
            first = _first_rows(table, columns.split, most)
            train = table.filter(lambda label: split_of_label(label, kind) == "train", input_columns=[columns.split])
            named = dict.fromkeys(SPLITS, table) | {"train": train}
        found = [split for split in first if first[split]]
        check_splits(source, found, tables if columns.split is None else found, to_train=to_train)
        rows = {split: _held_out(source, first[split], named[split], columns) for split in found if split != "train"}
        opened: dict = grouped(source, rows)
        if "train" in found:
            keys = {picture_key(cell): split for split, part in rows.items() for cell in part.cells() if cell}
            opened = {"train": StreamRows(source, named["train"], columns, keys)} | opened
        return opened


def _where(conditions: Sequence[Condition], columns: Columns, tables: dict) -> tuple[Columns, dict]:
    names, features = column_names(tables), next(iter(tables.values())).features
    typed = tuple(one.typed(features[one.column]) for one in conditions if one.column in names)
    if not typed:
        return columns, tables
    columns = attrs.evolve(columns, conditions=typed)
    keep = lambda *values: columns.keep(dict(zip(columns.of_captions, values)))
    return columns, {name: table.filter(keep, input_columns=columns.of_captions) for name, table in tables.items()}


def _first_rows(table, column: str, most: dict[str, int]) -> dict[str, list[dict]]:
    """The first rows of each split named by `column`, at most `most[split]`: one pass, which ends once there are
    enough."""
    first: dict[str, list[dict]] = {split: [] for split in SPLITS}
    unknown: list = []  # of the rows that are read here
    for values in table:
        label = name_of_label(values[column], table.features[column])
        if (split := split_of_label(label)) is None:
            unknown.append(label)
        elif len(first[split]) < most[split]:
            first[split].append(values)
        if all(len(first[split]) == most[split] for split in SPLITS):
            break
    report_labels(column, unknown, num_named=sum(map(len, first.values())))
    return first


def _held_out(source: str, rows: list[dict], like, columns: Columns) -> CaptionRows:
    rows = [values | {columns.image: with_bytes(values[columns.image], source)} for values in rows]
    return CaptionRows.of(in_memory(rows, like), np.arange(len(rows)), columns)
