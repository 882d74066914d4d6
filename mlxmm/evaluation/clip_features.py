"""Features of many images and texts, computed in batches in evaluation mode, and metrics of these features.

N images or texts, E features of the shared space, D of the vision tower.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice

import mlx.core as mx
import numpy as np

from mlxmm.errors import UserError
from mlxmm.evaluation.linear_probe import Labelled, linear_probe
from mlxmm.evaluation.retrieval import captions_of, retrieval
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.progress_bar import passing_bar
from mlxmm.training.module import evaluating

BATCH = 256  # images or texts computed at a time


def image_features(clip: ContrastiveCLIP, images: Iterable) -> np.ndarray:
    """PIL images to (N, E), unit length; `BATCH` images are in memory at a time. Raises `UserError` if N is 0."""
    return _features(clip, "picture", images, lambda part: clip.encode_image(clip.preprocess(part)))


def tower_features(clip: ContrastiveCLIP, images: Iterable) -> np.ndarray:
    """PIL images to (N, D), before the projection: what linear probes read (CLIP, appendix A.2)."""
    return _features(clip, "picture", images, lambda part: clip.vision(clip.preprocess(part)))


def text_features(clip: ContrastiveCLIP, texts: Iterable[str]) -> np.ndarray:
    """Texts to (N, E), unit length. Raises `UserError` if N is 0."""
    return _features(clip, "text", texts, lambda part: clip.encode_text(clip.tokenize(part)))


def _features(clip: ContrastiveCLIP, unit: str, items: Iterable, encode: Callable[[list], mx.array]) -> np.ndarray:
    parts, total = [], len(items) if isinstance(items, Sized) else None
    with evaluating(clip), passing_bar(f"encoding {unit}s", total, unit) as bar:
        for part in _batches(iter(items)):
            parts.append(np.array(encode(part).astype(mx.float32)))
            bar.update(len(part))
    if not parts:
        raise UserError("there are no images or texts to compute features of")
    return np.concatenate(parts)


def _batches(items: Iterator) -> Iterator[list]:
    while part := list(islice(items, BATCH)):
        yield part


def retrieve(clip: ContrastiveCLIP, rows: Sequence[dict]) -> dict[str, float]:
    """Metrics of `retrieval` between the pictures and all captions of `rows`. Rows of one picture count as one: copies
    of it would tie with it, and each be wrong for the other's captions. Raises `UserError` if there are no rows."""
    if not len(rows):
        raise UserError("retrieval needs at least one image")
    captions: dict[bytes, list[str]] = {}

    def images():
        for i in range(len(rows)):  # each row is read, and its image decoded, once
            row = rows[i]
            key = _pixels_key(row["image"])
            is_new = key not in captions
            captions.setdefault(key, []).extend(row["captions"])
            if is_new:
                yield row["image"]

    features = image_features(clip, images())
    texts, relevant = captions_of(list(captions.values()))
    return retrieval(features @ text_features(clip, texts).T, relevant)


def _pixels_key(image) -> bytes:
    """The same for images of equal pixels."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()


def probe(clip: ContrastiveCLIP, *splits: Sequence[tuple]) -> dict[str, float]:
    """`linear_probe` on features of the vision tower; `splits` are train, val and test (PIL image, label) pairs."""
    return linear_probe(*(_labelled(clip, split) for split in splits))


def _labelled(clip: ContrastiveCLIP, pairs: Sequence[tuple]) -> Labelled:
    labels = []

    def images():
        for image, label in pairs:
            labels.append(label)
            yield image

    return tower_features(clip, images()), np.array(labels)
