"""PictureColumn: the pictures of a table, each read from Arrow's memory when it is asked for; what tells them apart.

The checksums of bytes are computed once, in threads, and remembered for the files that hold the table, as these are.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import attrs
import numpy as np

from mlxmm.data.sources.arrow_columns import column_of, origin_of, selected_rows
from mlxmm.data.sources.picture_files import num_bytes_of, sha256_of
from mlxmm.distributed import collectives
from mlxmm.storage.remembered import remembered, state_of_files

NUM_DIGEST_BYTES = hashlib.sha256().digest_size
ROWS_AT_ONCE = 256  # that a thread hashes


@attrs.frozen(eq=False)
class PictureColumn(Sequence):
    """The cells {"bytes", "path"} of one column of a `datasets.Dataset`, row by row; None where there is none.

    Threads may read it.
    """

    chunks: tuple  # Arrow arrays
    selected: np.ndarray | None  # rows of the chunks that are those of the table; None: all
    origin: tuple[tuple[str, str], ...]  # (file, what of it); empty: memory holds the bytes

    @classmethod
    def of(cls, table: Any, column: str) -> "PictureColumn":
        """The column of a table whose pictures are not decoded."""
        return cls(column_of(table, column), selected_rows(table), origin_of(table, column))

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.selected is None else len(self.selected)

    def __getitem__(self, row: int) -> dict | None:
        index = row if self.selected is None else int(self.selected[row])
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        return self.chunks[chunk][index - int(self._ends[chunk]) + len(self.chunks[chunk])].as_py()

    def digest(self, row: int) -> bytes | None:
        """The SHA-256 of a row's bytes; None where it has none."""
        return self.digests[row].tobytes() if self.num_bytes[row] >= 0 else None

    def size(self, row: int) -> int:
        """How many bytes the file of a row's picture has; 0 if there is none."""
        own = int(self.num_bytes[row])
        return own if own >= 0 else num_bytes_of(self[row])

    def sha256(self, row: int) -> str:
        """The SHA-256 of the file of a row's picture, in hexadecimal; empty if there is none."""
        return self.digests[row].tobytes().hex() if self.num_bytes[row] > 0 else sha256_of(self[row])

    @cached_property
    def num_bytes(self) -> np.ndarray:
        """How many bytes each row holds; -1 where it has none, but perhaps the name of a file."""
        lengths = [_lengths(_field(chunk, "bytes")) for chunk in self.chunks]
        every = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        return every if self.selected is None else every[self.selected]

    @cached_property
    def digests(self) -> np.ndarray:
        """The SHA-256 of each row's bytes, (rows, 32) bytes; zeros where a row has none."""
        if not (self.num_bytes >= 0).any():
            return np.zeros((len(self), NUM_DIGEST_BYTES), np.uint8)
        key = self._key()
        data = self._hash() if key is None else remembered("sha256", key, self._hash)
        return np.frombuffer(data, np.uint8).reshape(len(self), NUM_DIGEST_BYTES)

    @cached_property
    def paths(self) -> list[str | None]:
        """The name in each row; of a row with bytes it is no more than a name."""
        own = [path for chunk in self.chunks for path in _field(chunk, "path").to_pylist()]
        return own if self.selected is None else [own[row] for row in self.selected]

    def identities(self, rows: np.ndarray) -> bytes:
        """What tells these pictures from others on this machine, one after the other."""
        return self._joined(rows, self.identity)

    def public_identities(self, rows: np.ndarray) -> bytes:
        """What tells these pictures from others on any machine, one after the other."""
        return self._joined(rows, self.public_identity)

    def _joined(self, rows: np.ndarray, identity: Callable[[int], bytes]) -> bytes:
        if (self.num_bytes[rows] >= 0).all():
            return self.digests[rows].tobytes()
        return b"".join(map(identity, rows.tolist()))

    def identity(self, row: int) -> bytes:
        """The checksum of a picture's bytes, or name, size and time of its file, which may be missing."""
        if (digest := self.digest(row)) is not None:
            return digest
        if (path := self.paths[row]) is None:
            return b"no image\n"
        try:
            stat = os.stat(path)
        except (OSError, ValueError):  # ValueError: a path that no file can have
            return f"{path}: no file\n".encode()
        return f"{path}:{stat.st_size}:{stat.st_mtime_ns}\n".encode()

    def public_identity(self, row: int) -> bytes:
        """The checksum of a picture's bytes, or name and size of its file."""
        if (digest := self.digest(row)) is not None:
            return digest
        name = os.path.basename(self.paths[row] or "")
        return f"{name}:{self.size(row)}\n".encode()

    def _key(self) -> bytes | None:
        """What the bytes follow from: the files that hold them, and which column and rows are read."""
        if not self.origin:
            return None
        rows = b"" if self.selected is None else hashlib.sha256(self.selected.tobytes()).digest()
        files, parts = zip(*self.origin)
        return state_of_files(files) + repr(parts).encode() + rows

    def _hash(self) -> bytes:
        starts = range(0, len(self), ROWS_AT_ONCE)
        with ThreadPoolExecutor(collectives.cores_per_process()) as pool:
            return b"".join(pool.map(self._hash_some, starts))

    def _hash_some(self, start: int) -> bytes:
        return b"".join(_sha256(self[row]) for row in range(start, min(start + ROWS_AT_ONCE, len(self))))

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.chunks)])[1:] if self.chunks else np.zeros(1, np.int64)


def _field(chunk, name: str):
    """A field of Arrow's structs; null where the struct is."""
    return chunk.flatten()[[field.name for field in chunk.type].index(name)]


def _lengths(chunk) -> np.ndarray:
    """How many bytes each value of an Arrow array has; -1 where it is null."""
    if chunk.null_count == len(chunk):  # it may be of the type null
        return np.full(len(chunk), -1, np.int64)
    ends = np.frombuffer(chunk.buffers()[1], np.int64 if str(chunk.type).startswith("large") else np.int32)
    own = ends[chunk.offset : chunk.offset + len(chunk) + 1]
    lengths = (own[1:] - own[:-1]).astype(np.int64)
    return np.where(chunk.is_null().to_numpy(zero_copy_only=False), -1, lengths) if chunk.null_count else lengths


def _sha256(cell: dict | None) -> bytes:
    known = cell and cell["bytes"] is not None
    return hashlib.sha256(cell["bytes"]).digest() if known else bytes(NUM_DIGEST_BYTES)
