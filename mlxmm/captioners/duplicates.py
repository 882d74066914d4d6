"""Captions that say the same, and pictures that look the same. Pure functions."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from PIL import Image

from mlxmm.errors import UserError
from mlxmm.evaluation.caption_metrics import words

INSTALL = 'pip install "mlxmm[filters]"'


def same_captions(texts: Sequence[str], most: int) -> list[int]:
    """The places of the texts whose words are those of at least `most` texts before them."""
    counts: dict[str, int] = defaultdict(int)
    repeats = []
    for place, text in enumerate(texts):
        key = " ".join(words(text))
        if counts[key] >= most:
            repeats.append(place)
        counts[key] += 1
    return repeats


def similar_captions(texts: Sequence[str], groups: Sequence[Hashable], most: float) -> dict[int, float]:
    """The similarity of each text that is more than `most` like one kept before it in its group, by its place.

    The similarity is rapidfuzz's `ratio` of the words, 0 to 1: twice the length of the longest common subsequence of
    characters, divided by both lengths.
    """
    try:
        from rapidfuzz import fuzz, process
    except ImportError:
        raise UserError(f"a filter of near-duplicate captions needs rapidfuzz: {INSTALL}") from None
    kept: dict[Hashable, list[str]] = defaultdict(list)
    repeats = {}
    for place, (text, group) in enumerate(zip(texts, groups, strict=True)):
        normal = " ".join(words(text))
        nearest = process.extractOne(normal, kept[group], scorer=fuzz.ratio)
        if nearest is not None and nearest[1] > 100 * most:
            repeats[place] = nearest[1] / 100
        else:
            kept[group].append(normal)
    return repeats


def perceptual_hashes(images: Iterable[Image.Image]) -> np.ndarray:
    """The 64-bit pHash of each image (N,): pictures that look the same differ in few bits, however they are stored."""
    try:
        from imagehash import phash
    except ImportError:
        raise UserError(f"a filter of pictures that look the same needs ImageHash: {INSTALL}") from None
    bits = [np.packbits(phash(image).hash) for image in images]
    return np.concatenate(bits).view(np.uint64) if bits else np.zeros(0, np.uint64)


def nearest_distances(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each hash (N,) in how many bits it differs from the nearest of `others` (M,); 65 if there are none."""
    return np.array([np.bitwise_count(others ^ one).min(initial=65) for one in hashes], dtype=np.int64)
