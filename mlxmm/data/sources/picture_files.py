"""The files of pictures in the cells of a table, and their hashes, by which equal pictures are found.

A cell may hold any text as its path. `os.path` takes one that no file can have for absent, where `Path` raises.
"""

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from mlxmm.distributed import collectives


class Hashed(Protocol):
    """Pictures that have a SHA-256 each."""

    def __len__(self) -> int: ...

    def sha256(self, place: int) -> str: ...


def file_of(cell: dict | None) -> bytes:
    """The bytes of the picture's file in a cell {"bytes", "path"}; empty if there is none."""
    if not cell or cell["bytes"] is not None or cell["path"] is None:
        return (cell or {}).get("bytes") or b""
    return Path(cell["path"]).read_bytes() if os.path.isfile(cell["path"]) else b""


def num_bytes_of(cell: dict | None) -> int:
    """The size of the picture's file in a cell, which is not read; 0 if there is none."""
    if not cell or cell["bytes"] is not None or cell["path"] is None:
        return len((cell or {}).get("bytes") or b"")
    return os.path.getsize(cell["path"]) if os.path.isfile(cell["path"]) else 0


def sha256_of(cell: dict | None) -> str:
    """The SHA-256 of the picture's file, in hexadecimal; empty if there is none."""
    return hashlib.sha256(file).hexdigest() if (file := file_of(cell)) else ""


def hashes_of(pictures: Hashed, num_threads: int) -> list[str]:
    """The SHA-256 of each picture's file. A collective call: each process reads its share."""
    share = range(collectives.rank(), len(pictures), collectives.world_size())
    with ThreadPoolExecutor(num_threads) as pool:
        own = list(zip(share, pool.map(pictures.sha256, share)))
    return [sha256 for _, sha256 in sorted(itertools.chain(*collectives.all_gather_object(own)))]
