"""Which rows of a source's tables are for what: by a column, by the source's own splits, or drawn at random."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlxmm.data.sources.arrow_columns import encoded
from mlxmm.data.sources.formats import RANDOM, SPLIT_OF, SPLITS, name_of_label, split_of_label
from mlxmm.data.sources.picture_column import PictureColumn
from mlxmm.data.sources.tables import Columns, concatenated, is_restval, named_splits, report_restval, tell
from mlxmm.data.sources.twins import picture_numbers
from mlxmm.errors import UserError

HELD_OUT = 0.05  # fraction of the rows for each of val and test, if a source has no splits


def split_tables(tables: dict, columns: Columns, seed: int) -> dict[str, tuple]:
    """(table, indices) of each of our splits: by a column, by the source's own splits, or at random."""
    if columns.split is None and has_splits(tables):
        return {split: (table, np.arange(len(table))) for split, table in named_splits(tables).items()}
    table = concatenated(list(tables.values()))
    by_column = columns.split not in (None, RANDOM)
    parts = _rows_by_label(table, columns.split) if by_column else _random_split(table, columns.image, seed)
    return {split: (table, rows) for split, rows in parts.items()}


def has_splits(tables: dict) -> bool:
    """Whether a source says which rows are for what: one table says so if it is for evaluation."""
    return len(tables) > 1 or SPLIT_OF.get(next(iter(tables))) in ("val", "test")


def _rows_by_label(table, column: str) -> dict[str, np.ndarray]:
    """The rows of each split that a column names. Labels that name none are printed, with their number."""
    kind = table.features[column]
    if not hasattr(kind, "dtype"):  # lists and structs
        report_labels(column, table[column][:], num_named=0)
    values, codes = encoded(table, column)
    labels = [name_of_label(value, kind) for value in values]
    splits = np.array([split_of_label(label) or "" for label in labels] or [""])[codes]
    unknown = codes[splits == ""].tolist()
    report_labels(column, [labels[code] for code in unknown], num_named=len(codes) - len(unknown))
    report_restval(int((codes == code).sum()) for code, label in enumerate(labels) if is_restval(label))
    return {split: np.flatnonzero(splits == split) for split in SPLITS}


def labels_in(table, column: str) -> list:
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


def _random_split(table, image_column: str, seed: int) -> dict[str, np.ndarray]:
    """Rows of each split, drawn by picture: a picture with several rows is on one side."""
    pictures = picture_numbers(PictureColumn.of(table, image_column))
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
