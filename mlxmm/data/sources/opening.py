"""The rows of a source by split, from its tables: with captions from elsewhere, those of one picture as one row."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np

from mlxmm.data.sources.formats import RANDOM, SPLITS
from mlxmm.data.sources.joined import Join
from mlxmm.data.sources.picture_column import PictureColumn
from mlxmm.data.sources.row_splits import has_splits, labels_in, split_tables
from mlxmm.data.sources.rows import CaptionRows
from mlxmm.data.sources.tables import Columns, check_splits, column_names, concatenated, open_tables, reading_errors
from mlxmm.data.sources.twins import grouped
from mlxmm.errors import UserError
from mlxmm.preprocessing.picture_folder import files_below, is_picture
from mlxmm.terminal import counted

NOT_UNASKED = f", which are not trained on unasked: --data.split-column {RANDOM} divides all rows anew"


def open_rows(
    source: str,
    columns: Columns,
    *,
    seed: int,
    join: Join | None = None,
    to_train: bool = True,
    **which,
) -> dict[str, CaptionRows]:
    """The rows of `source`, by split: "train", "val", "test"; unless it is `to_train`, of those that it has.

    `source` is a path that `formats.py` reads, or a data set on the Hub; `which` of it, as `CaptionDataConfig.which`
    says. With `join` its captions are from elsewhere. Raises `UserError` if it, a column or a split does not exist.
    """
    tables = _joined_tables(source, columns, join, **which)
    parts = split_tables(tables, columns, seed)
    rows = _caption_rows({split: part for split, part in parts.items() if len(part[1])}, columns)
    column = None if columns.split == RANDOM else columns.split
    names = tables if column is None else labels_in(concatenated(list(tables.values())), column)
    if to_train and not (column or columns.split is None and has_splits(tables)):
        _check_divisible(source, sum(map(len, tables.values())), has_captions_from_elsewhere=join is not None)
    check_splits(source, rows, names, column, to_train=to_train, hint=NOT_UNASKED)
    return grouped(source, rows)


def _check_divisible(source: str, num_rows: int, *, has_captions_from_elsewhere: bool) -> None:
    """Raise `UserError` where rows that are divided at random are too few for three splits."""
    if num_rows < len(SPLITS):
        which = " with a caption" if has_captions_from_elsewhere else ""
        raise UserError(
            f"{source} has {counted(num_rows, 'row')}{which}: {', '.join(SPLITS)} need one each, and it has no splits "
            "of its own; give more, or name the captions of more of its pictures"
        )


def _caption_rows(parts: Mapping[str, tuple], columns: Columns) -> dict[str, CaptionRows]:
    """The rows of each split; those of one table share what is known of it."""
    whole = {id(table): CaptionRows.of(table, np.arange(len(table)), columns) for table, _ in parts.values()}
    return {split: attrs.evolve(whole[id(table)], indices=indices) for split, (table, indices) in parts.items()}


def open_training_rows(source: str, columns: Columns, *, seed: int, join: Join | None = None, **which) -> CaptionRows:
    """The training rows of `source`; all of its rows, if it has no splits. It need not have the split column.

    Raises `UserError` as `open_rows` does, and if there are none.
    """
    tables = _joined_tables(source, attrs.evolve(columns, split=None), join, **which)
    if columns.split not in [RANDOM, *column_names(tables)]:
        columns = attrs.evolve(columns, split=None)
    if columns.split == RANDOM or columns.split is None and not has_splits(tables):
        table = concatenated(list(tables.values()))
        parts = {"train": (table, np.arange(len(table)))}
    else:
        parts = split_tables(tables, columns, seed)
    if "train" not in parts or not len(parts["train"][1]):
        raise UserError(f"{source} has no rows for train; its splits are {', '.join(tables)}{NOT_UNASKED}")
    return grouped(source, {"train": CaptionRows.of(*parts["train"], columns)})["train"]


def _joined_tables(source: str, columns: Columns, join: Join | None, **which) -> dict:
    """The tables of a source, with captions of its own or from elsewhere."""
    with reading_errors(source):
        tables = open_tables(source, attrs.evolve(columns, caption=None) if join else columns, **which)
    return join(source, tables, columns) if join else tables


def unlisted_pictures(folder: Path, tables: Sequence, column: str) -> list[Path]:
    """The images in a folder that its metadata do not name: `datasets` ignores them."""
    pictures = list(filter(is_picture, files_below(folder))) if folder.is_dir() else []
    listed = {path for table in tables if pictures for path in PictureColumn.of(table, column).paths if path}
    if all(os.path.abspath(path) in listed for path in pictures):  # without asking the disk about each
        return []
    real = {os.path.realpath(path) for path in listed if os.path.lexists(path)}
    return sorted(path for path in pictures if os.path.realpath(path) not in real)
