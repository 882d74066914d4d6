"""Which images of a source cannot be decoded: found by decoding each one, and remembered in the cache.

    <cache>/undecodable/<key>.json    {"undecodable": [places], "checksum": of these}

The key is made of the images and of what decodes them, so the file stays right as long as it is found.
"""

import contextlib
import hashlib
import itertools
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from mlxmm.distributed import collectives
from mlxmm.preprocessing.images import DECODER
from mlxmm.progress_bar import passing_bar
from mlxmm.storage import json_values
from mlxmm.storage.atomic import write_json
from mlxmm.storage.cache import cache_folder

FOLDER = "undecodable"
PICTURES_AT_ONCE = 16  # that a thread decodes before it asks for more


class Decodable(Protocol):
    """Rows that say whether the image at a place can be decoded."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> bytes: ...

    def is_decodable(self, place: int) -> bool: ...


def undecodable_places(rows: Decodable, num_threads: int) -> list[int]:
    """The places of the rows whose images cannot be decoded, in ascending order.

    A collective call: rank 0 tells what it remembers. If that is nothing, each process decodes its share.
    """
    path = _path(rows) if collectives.rank() == 0 else None
    places = collectives.broadcast_object(lambda: _read(path))
    if places is None:
        share = range(collectives.rank(), len(rows), collectives.world_size())
        places = sorted(itertools.chain(*collectives.all_gather_object(_find(rows, share, num_threads))))
        if path is not None:
            _write(path, places)
    return places


def _path(rows: Decodable) -> Path:
    key = hashlib.sha256(rows.fingerprint() + DECODER.encode()).hexdigest()[:32]
    return cache_folder(FOLDER) / f"{key}.json"


def _read(path: Path) -> list[int] | None:
    """What was remembered; None if there is nothing, or if it is damaged."""
    try:
        values = json_values.read(path)
        return values["undecodable"] if values["checksum"] == _checksum(values["undecodable"]) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, places: list[int]) -> None:
    with contextlib.suppress(OSError):  # without a cache that can be written, the next start decodes again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"undecodable": places, "checksum": _checksum(places)})


def _checksum(places: Sequence[int]) -> int:
    return zlib.crc32(json.dumps(places).encode())


def _find(rows: Decodable, places: Sequence[int], num_threads: int) -> list[int]:
    pool, some = ThreadPoolExecutor(num_threads), range(0, len(places), PICTURES_AT_ONCE)
    try:
        checked = pool.map(lambda i: [rows.is_decodable(place) for place in places[i : i + PICTURES_AT_ONCE]], some)
        results = itertools.chain.from_iterable(checked)
        with passing_bar("checking pictures", len(places), "picture", results) as bar:
            return [place for place, is_good in zip(places, bar) if not is_good]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of pictures
