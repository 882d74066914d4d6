"""Features of pictures, computed once and kept on disk: float16, memory-mapped, finished block by block.

    <folder>/features.bin    (N, P, E) float16 in the order of the rows
    <folder>/blocks.jsonl    a line for each block that is whole: its number and its checksum

N rows, P positions, E features. A block that was cut off, or that was damaged since, is computed again.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import mlx.core as mx
import numpy as np

from mlxmm.data.loader import Loader

BLOCK = 64  # rows that are computed, written and checked together


def cache_key(**parts) -> str:
    """A folder's name for what features depend on: JSON values, and byte strings of any length."""
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        digest.update(f"{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()[:16]


def cached_features(
    folder: Path,
    rows: Sequence,
    pixels: Callable[[dict], np.ndarray],
    compute: Callable[[mx.array], mx.array],
    **options,
) -> np.ndarray:
    """The features (N, P, E) of `rows` as a read-only memory map, computed where `folder` does not have them.

    `pixels(row)` gives (H, W, 3) bytes, in the loader's threads; `compute` turns (B, H, W, 3) of them into (B, P, E).
    `options` goes to the Loader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_blocks = -(-len(rows) // BLOCK)
    shape = compute(mx.array(pixels(rows[0]))[None]).shape[1:]
    features = _opened(folder / "features.bin", (len(rows), *shape))
    whole = {block for block, checksum in _recorded(folder) if _checksum(features, block) == checksum}
    missing = [block for block in range(num_blocks) if block not in whole]
    with (folder / "blocks.jsonl").open("a") as journal:
        for block, values in zip(missing, _computed(rows, missing, pixels, compute, options)):
            features[block * BLOCK : (block + 1) * BLOCK] = values
            features.flush()  # the features first: a line in the journal says that they are there
            journal.write(json.dumps([block, _checksum(features, block)]) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
    return np.memmap(folder / "features.bin", np.float16, "r", shape=features.shape)


def _computed(rows, blocks: list[int], pixels, compute, options) -> Iterator[np.ndarray]:
    places = [place for block in blocks for place in range(block * BLOCK, min(len(rows), (block + 1) * BLOCK))]
    loader = Loader(
        rows=_Chosen(rows, places), transform=lambda row, rng: {"pixels": pixels(row)}, batch_size=BLOCK, **options
    )
    compiled = mx.compile(lambda batch: compute(batch).astype(mx.float16))
    for batch in loader.epoch(0) if blocks else ():
        yield np.array(compiled(mx.array(batch["pixels"])))


def _opened(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """The file at its full length; what was never written reads as zeros."""
    size = int(np.prod(shape)) * 2
    if not path.exists() or path.stat().st_size != size:
        with path.open("ab") as file:
            file.truncate(size)
    return np.memmap(path, np.float16, "r+", shape=shape)


def _recorded(folder: Path) -> list[tuple[int, int]]:
    """What the journal says; its last line may have been cut off."""
    if not (folder / "blocks.jsonl").exists():
        return []
    text = (folder / "blocks.jsonl").read_text()
    if text and not text.endswith("\n"):  # the next line must not join what is left of this one
        (folder / "blocks.jsonl").write_text(text[: text.rfind("\n") + 1])
    return [tuple(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _checksum(features: np.ndarray, block: int) -> int:
    return zlib.crc32(features[block * BLOCK : (block + 1) * BLOCK].tobytes())


@attrs.frozen
class FeatureRows(Sequence):
    """`rows` with their features (P, E) in place of their pictures, which are not touched."""

    rows: Sequence
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict:
        return {"features": self.features[place]} | self.rows.without_image(place)


@attrs.frozen
class _Chosen(Sequence):
    rows: Sequence
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int):
        return self.rows[self.places[i]]
