"""Rows of one picture: tables with a row for each caption become tables with a row for each picture.

A picture is known by its file, or by its name and bytes where the table has these.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mlxmm.data.sources.picture_column import PictureColumn
from mlxmm.data.sources.tables import tell, with_columns
from mlxmm.terminal import counted

PLAIN = (str, bool, int, float, type(None))
MAX_SHOWN = 5


def picture_numbers(pictures: PictureColumn) -> np.ndarray:
    """For each row the number of its picture, whatever its name, by first appearance."""
    rows = np.arange(len(pictures))
    return rows if _all_differ([(pictures, rows)]) else _numbers([(d or path,) for path, d in _known(pictures, rows)])


def picture_key(cell) -> bytes | str | None:
    """What a picture is known by in all splits: its bytes, or its file; None if there is none."""
    return content(cell) or cell["path"] if isinstance(cell, dict) else None


def content(cell: Mapping) -> bytes | None:
    """A checksum of the bytes in a cell; None if it names a file."""
    return None if cell["bytes"] is None else hashlib.sha256(cell["bytes"]).digest()


def _known(pictures: PictureColumn, rows: np.ndarray) -> list[tuple[str | None, bytes | None]]:
    """What rows of one picture have in common: the name of a file, and its bytes where the table has them."""
    return [(pictures.paths[row], pictures.digest(row)) for row in rows.tolist()]


def _all_differ(parts: Sequence[tuple[PictureColumn, np.ndarray]]) -> bool:
    """Whether it is plain that no picture is there twice: the first bytes of all checksums differ."""
    if not all((pictures.num_bytes[rows] >= 0).all() for pictures, rows in parts):
        return False
    heads = np.concatenate([pictures.digests[rows, :8].copy().view(np.uint64)[:, 0] for pictures, rows in parts])
    heads.sort()
    return bool((heads[1:] != heads[:-1]).all())


def _numbers(pictures: Sequence[tuple]) -> np.ndarray:
    """A row without a picture has a number of its own."""
    numbers: dict = {}
    keys = (one if any(one) else row for row, one in enumerate(pictures))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], int)


def grouped(source: str, rows: Mapping) -> dict:
    """`CaptionRows` by split, those of one picture as one row with all its captions.

    Prints how many rows are of how many pictures, and which pictures of a held-out split are in train too: what is
    measured on these is no generalisation. Columns that differ between captions become lists, as those of tables with
    lists of captions are.
    """
    if not rows or _all_differ([(part.pictures, part.indices) for part in rows.values()]):
        return dict(rows)
    pictures = {split: _known(part.pictures, part.indices) for split, part in rows.items()}
    numbers = {split: _numbers(own) for split, own in pictures.items()}
    num_rows, num_pictures = sum(map(len, numbers.values())), sum(len(set(own.tolist())) for own in numbers.values())
    if num_pictures < num_rows:
        tell(f"{num_rows} rows of {source} are of {num_pictures} pictures: a picture is one row with all its captions")
    for split in [name for name in pictures if name != "train"]:
        _report_shared(source, split, rows, pictures)
    return {split: _grouped(part, numbers[split]) for split, part in rows.items()}


def _report_shared(source: str, split: str, rows: Mapping, pictures: Mapping) -> None:
    trained = {digest or path for path, digest in pictures.get("train", ())} - {None}
    places = {digest or path: row for row, (path, digest) in reversed(list(enumerate(pictures[split])))}
    shared = sorted(row for one, row in places.items() if one in trained)
    if shared:
        names = ", ".join(map(rows[split].name, shared[:MAX_SHOWN]))
        tell(f"{counted(len(shared), 'picture')} of {split} of {source} in train too: {names}")


def _grouped(rows, numbers: np.ndarray):
    """The first row of each picture, where the columns have what is known of all. Other rows stay in the table, unread:
    rows are named by their places there."""
    groups: dict[int, list[int]] = {}
    for place, number in enumerate(numbers.tolist()):
        groups.setdefault(number, []).append(place)
    if len(groups) == len(numbers):
        return rows
    captions, first = list(rows.caption_lists()), rows.indices[[own[0] for own in groups.values()]]

    def column(values: Iterable[list]) -> list[list]:
        cells: list[list] = [[] for _ in range(len(rows.table))]
        for index, value in zip(first.tolist(), values):
            cells[index] = value
        return cells

    columns = {
        rows.columns.caption: column([text for place in own for text in captions[place]] for own in groups.values())
    }
    selected = rows.table.select(rows.indices)
    for name in selected.column_names:
        values = selected[name][:] if name not in (rows.columns.image, rows.columns.caption) else []
        if values and all(isinstance(value, PLAIN) for value in values) and _differs(values, groups):
            own_values = ([values[place] for place in own for _ in captions[place]] for own in groups.values())
            columns[name] = column(own_values)
    return rows.of(with_columns(rows.table, columns), first, rows.columns)


def _differs(values: Sequence, groups: Mapping) -> bool:
    return any(values[place] != values[own[0]] for own in groups.values() for place in own)
