"""What is in a source: sizes, captions, pictures that are broken or there twice; and what makes a run meaningless."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import attrs
import numpy as np

from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.pictures import Pictures, pictures_of
from mlxmm.data.sources.mixed import MixedRows
from mlxmm.data.sources.rows import CaptionRows, Rows, is_stream
from mlxmm.distributed import collectives
from mlxmm.preprocessing.images import UndecodableImage, decode_image
from mlxmm.terminal import counted

FEW = 8  # pictures: of fewer, all may be right by chance
LEAK = "what is measured on {} is partly remembered: {} of its {} pictures, as {} has them too"


@attrs.frozen
class Overview:
    """The rows of one split: place by place, what each has."""

    captions: list[list[str]]
    hashes: list[str]  # SHA-256 of the picture's file
    sizes: list[tuple[int, int] | None]  # (width, height) in pixels; None: it cannot be decoded
    names: list[str]

    @property
    def broken(self) -> list[str]:
        """The names of pictures that cannot be decoded."""
        return [name for name, size in zip(self.names, self.sizes) if size is None]

    @property
    def captionless(self) -> list[str]:
        """The names of rows without a caption."""
        return [name for name, captions in zip(self.names, self.captions) if not captions]

    @property
    def copies(self) -> list[list[str]]:
        """The names of the rows of each picture that has several."""
        rows = defaultdict(list)
        for name, sha256 in zip(self.names, self.hashes):
            rows[sha256].append(name)
        return [names for names in rows.values() if len(names) > 1]


def look_at(rows: Rows, num_threads: int) -> Overview:
    """Look at all rows of a split; every picture is decoded."""
    pictures, places = pictures_of(rows), range(len(rows))
    with ThreadPoolExecutor(num_threads) as pool:
        looked = list(pool.map(lambda place: _picture(pictures, place), places))
    captions = list(rows.caption_lists()) if isinstance(rows, CaptionRows) else [_captions(rows, i) for i in places]
    hashes, sizes = [one for one, _ in looked], [size for _, size in looked]
    name_of_broken = getattr(rows, "name_of_broken", rows.name)
    names = [rows.name(place) if sizes[place] else name_of_broken(place) for place in places]
    return Overview(captions, hashes, sizes, names)


def _captions(rows: Rows, place: int) -> list[str]:
    return rows.without_image(place)["captions"]


def _picture(pictures: Pictures, place: int) -> tuple[str, tuple[int, int] | None]:
    file = pictures.file(place)
    try:
        size = decode_image(file or None).size
    except UndecodableImage:
        size = None
    return hashlib.sha256(file or str(place).encode()).hexdigest(), size


def five_numbers(values: Sequence[int]) -> str:
    """The smallest, the median and the largest, in words."""
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{low:g} to {high:g}, median {middle:g}"


def shared(splits: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each pair of splits that share pictures, of which the hashes are given."""
    lines = []
    for first, second in combinations(splits, 2):
        known = set(splits[first])
        if number := sum(sha256 in known for sha256 in splits[second]):
            lines.append(LEAK.format(second, number, len(splits[second]), first))
    return lines


def meaningless(num_rows: Mapping[str, int], batch_size: int, *, contrastive: bool = True) -> list[str]:
    """A line for each setting that leaves nothing to learn or to measure. `num_rows` are those of each split."""
    lines, pairs = [], min(batch_size * collectives.world_size(), num_rows.get("train", 0))
    if contrastive and pairs == 1:
        lines.append("a contrastive loss compares pairs: with one pair in a batch it is 0, and nothing is learned")
    if num_rows.get("val") == 1:
        lines.append("val has one picture: val/loss says little, and its controls (_shuffled) are equal to it")
    few = {split: number for split, number in num_rows.items() if number < FEW and (split, number) != ("val", 1)}
    return lines + [too_few(split, number) for split, number in few.items() if split != "train" and number]


def too_few(split: str, number: int) -> str:
    """The line about a split of few pictures."""
    return f"{split} has {counted(number, 'picture')}: what is measured on so few says little, a perfect value too"


def training_warnings(source: CaptionSource, *, contrastive: bool) -> list[str]:
    """A line for each thing about a source that makes a run or its metrics meaningless; none of a stream."""
    if any(map(is_stream, source.rows.values())):
        return []
    num_rows = {split: len(rows) for split, rows in source.rows.items()}
    return meaningless(num_rows, source.config.batch_size, contrastive=contrastive) + shared(_same_files(source.rows))


def _same_files(splits: Mapping[str, Rows]) -> dict[str, list[str]]:
    """For each split a key for each picture: its hash, if there are others of its size; equal files have equal keys."""
    own = {split: rows.parts[0] if isinstance(rows, MixedRows) else rows for split, rows in splits.items()}
    tables = {split: rows for split, rows in own.items() if isinstance(rows, CaptionRows)}
    sizes = {split: [rows.pictures.size(row) for row in rows.indices.tolist()] for split, rows in tables.items()}
    in_splits = defaultdict(set)
    for split, numbers in sizes.items():
        for number in numbers:
            in_splits[number].add(split)

    def key(split: str, place: int) -> str:
        number, rows = sizes[split][place], tables[split]
        is_shared = number and len(in_splits[number]) > 1
        return rows.pictures.sha256(int(rows.indices[place])) if is_shared else f"{split} {place}"

    return {split: [key(split, place) for place in range(len(rows))] for split, rows in tables.items()}
