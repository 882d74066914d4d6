"""What lies below a `datasets.Dataset`: Arrow's columns in memory or in mapped files, and which rows of them it has."""

import hashlib

import numpy as np


def column_of(table, name: str) -> tuple:
    """The Arrow arrays of a column, one after the other; `selected_rows` says which of their values are the table's."""
    return tuple(table.data.column(name).chunks)


def selected_rows(table) -> np.ndarray | None:
    """The numbers of the rows that the table has of its columns, in its order; None: all of them."""
    indices = table._indices  # there is no other way to it without a copy of what is selected
    return None if indices is None else indices.column(0).to_numpy().astype(np.int64)


def origin_of(table, name: str) -> tuple[tuple[str, str], ...]:
    """What the values of a column follow from: its name, and for each mapped file that holds some of them, the path and
    what of the file they are. Empty where memory holds some."""
    tables = [part for row in getattr(table.data, "blocks", [[table.data]]) for part in row]
    parts = [part for part in tables if name in part.column_names]
    if not all(hasattr(part, "path") for part in parts):
        return ()
    # `datasets` takes consecutive rows as a slice of the file, which has no `selected_rows`.
    return tuple((part.path, f"{name} {[one for one in part.replays if one[0] == 'slice']}") for part in parts)


def encoded(table, name: str) -> tuple[list, np.ndarray]:
    """The different values of a column, and for each row which of them it has."""
    every = table.data.column(name).combine_chunks().dictionary_encode(null_encoding="encode")
    codes, selected = np.asarray(every.indices), selected_rows(table)
    return every.dictionary.to_pylist(), codes if selected is None else codes[selected]


def checksum_of(table) -> bytes:
    """A SHA-256 of the values of a table, without making Python objects of them."""
    digest, selected = hashlib.sha256(), selected_rows(table)
    for batch in table.data.to_batches():
        digest.update(batch.serialize())
    digest.update(b"" if selected is None else selected.tobytes())
    return digest.digest()
