"""Features of images, computed once and kept on disk: float16, memory-mapped, written block by block.

    <folder>/features.bin    (N, P, E) float16 in the order of the rows
    <folder>/blocks.jsonl    one line per complete block: its number and its checksum

N rows, P positions, E features. A block that is incomplete or damaged is computed again.
"""

import contextlib
import hashlib
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import attrs
import mlx.core as mx
import numpy as np

from mlxmm.data.cached_rows import CachedRows
from mlxmm.data.loader import prefetched
from mlxmm.data.sources.rows import Rows
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import check_end
from mlxmm.progress_bar import passing_bar
from mlxmm.storage import json_values
from mlxmm.storage.atomic import cut_to_lines, sync
from mlxmm.storage.disk import naming, require_file
from mlxmm.storage.lock import taking_turns

FEATURES, JOURNAL = "features.bin", "blocks.jsonl"
BLOCK = 64  # rows that are computed, written and checked together


def cache_key(**parts) -> str:
    """The name of a folder, made from everything that features depend on: JSON values, and byte strings."""
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        digest.update(f"{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()[:16]


def cached_features(
    folder: Path,
    rows: Rows,
    pixels: Callable[[dict], np.ndarray],
    compute: Callable[[mx.array], mx.array],
    *,
    num_threads: int = 1,
) -> np.ndarray:
    """The features (N, P, E) of `rows` as a read-only memory map, computed where `folder` does not have them.

    `pixels(row)` gives (H, W, 3) bytes, in `num_threads` threads; `compute` turns (B, H, W, 3) of them into (B, P, E).
    A collective call: all processes compute the same blocks in the same order, since a sharded tower needs all of
    them; rank 0 alone writes. Of several runs that want the same features, one computes them and the others wait.
    """
    shape = (len(rows), *compute(mx.array(pixels(rows[0]))[None]).shape[1:])
    with taking_turns(folder) if collectives.rank() == 0 else contextlib.nullcontext():
        missing = collectives.broadcast_object(lambda: _missing_blocks(folder, shape))
        computed = _computed(rows, missing, pixels, compute, num_threads)
        if collectives.rank() == 0:
            _write_blocks(folder, shape, zip(missing, computed))
        else:
            deque(computed, maxlen=0)
    collectives.barrier()
    return np.memmap(folder / FEATURES, np.float16, "r", shape=shape)


def _missing_blocks(folder: Path, shape: tuple[int, ...]) -> list[int]:
    folder.mkdir(parents=True, exist_ok=True)
    features = _opened(folder / FEATURES, shape)
    whole = {block for block, checksum in _recorded(folder) if _checksum(features, block) == checksum}
    return [block for block in range(-(-len(features) // BLOCK)) if block not in whole]


def _write_blocks(folder: Path, shape: tuple[int, ...], blocks: Iterable[tuple[int, np.ndarray]]) -> None:
    _opened(folder / FEATURES, shape)
    with (folder / FEATURES).open("r+b") as file, (folder / JOURNAL).open("ab") as journal, naming(folder / FEATURES):
        for block, values in blocks:
            # Not by the memory map: a full disk would end the process by a signal there.
            file.seek(block * BLOCK * values[0].nbytes)
            _write(file, values.tobytes())  # the features first: a line in the journal says that they are there
            _write(journal, json.dumps([block, zlib.crc32(values.tobytes())]).encode() + b"\n")


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    sync(file.fileno())


def _computed(rows: Rows, blocks: list[int], pixels, compute, num_threads: int) -> Iterator[np.ndarray]:
    """The features of each block, while threads prepare the pixels of the next ones."""
    compiled = mx.compile(lambda batch: compute(batch).astype(mx.float16))
    with ThreadPoolExecutor(num_threads) as pool:
        row_pixels = lambda place: pixels(rows[place])
        places = (range(block * BLOCK, min(len(rows), (block + 1) * BLOCK)) for block in blocks)
        batches = prefetched({"pixels": np.stack(list(pool.map(row_pixels, part)))} for part in places)
        with passing_bar("caching features", len(blocks), "picture", batches, unit_scale=BLOCK) as bar:
            for batch in bar:
                check_end()  # a block that is written stays
                features = np.array(compiled(mx.array(batch["pixels"])))
                yield features


def _opened(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """The file at its full length; blocks that were never written read as zeros."""
    size = int(np.prod(shape)) * 2
    require_file(path)
    if not path.exists() or path.stat().st_size != size:
        with naming(path), path.open("ab") as file:
            file.truncate(size)
    return np.memmap(path, np.float16, "r+", shape=shape)


def _recorded(folder: Path) -> list[tuple[int, int]]:
    """(block, checksum) of each line of the journal, whose last line may be incomplete."""
    if not (folder / JOURNAL).exists():
        return []
    require_file(folder / JOURNAL)
    cut_to_lines(folder / JOURNAL)  # the next line must not be appended to an incomplete one
    return list(filter(None, map(_record, (folder / JOURNAL).read_bytes().splitlines())))


def _record(line: bytes) -> tuple[int, int] | None:
    """Block and checksum of a line; None for a damaged one, whose block is computed again."""
    try:
        block, checksum = json_values.loads(line)
    except (ValueError, TypeError):
        return None
    return (block, checksum) if isinstance(block, int) and isinstance(checksum, int) and block >= 0 else None


def _checksum(features: np.ndarray, block: int) -> int:
    return zlib.crc32(features[block * BLOCK : (block + 1) * BLOCK].tobytes())


@attrs.frozen
class FeatureRows(CachedRows):
    """`rows` with their features (P, E) in place of their images, which are not decoded."""

    features: np.ndarray

    def __getitem__(self, place: int) -> dict:
        return {"features": self.features[place]} | self.rows.without_image(place)
