"""ZeroShotClassifier: a linear classifier built from class names alone (CLIP, section 3.1.2).

B images, C classes, E features of the shared space.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxmm.errors import UserError
from mlxmm.evaluation.clip_features import image_features, text_features
from mlxmm.evaluation.prompt_templates import PHOTO
from mlxmm.evaluation.retrieval import class_labels, top_k
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.networks.towers import l2_normalize
from mlxmm.preprocessing.images import as_images
from mlxmm.storage.atomic import read_arrays
from mlxmm.storage.cache import cached
from mlxmm.storage.pretrained import write_arrays

FORMAT = b"2"  # of what is kept in the cache; the first had no bias


@attrs.frozen(eq=False)
class ZeroShotClassifier:
    """One unit vector a class, built once by the text tower and used for any number of images.

    `weights` is (C, E); `scale` multiplies cosines before the softmax. A SigLIP also has a `bias`, which is added, and
    each class a probability of its own, the sigmoid (SigLIP, section 3.1). Only images need `clip`.
    """

    class_names: tuple[str, ...]
    weights: mx.array
    scale: mx.array
    clip: ContrastiveCLIP | None = None
    bias: mx.array | None = None

    @classmethod
    def build(
        cls, clip: ContrastiveCLIP, class_names: Sequence[str], templates: Sequence[str] = PHOTO
    ) -> "ZeroShotClassifier":
        """Average each class's templates in embedding space: unit vectors, their mean, unit again.

        Raises `UserError` for class names that are empty or repeated, and for templates without {}.
        """
        texts = _texts(class_names, templates)
        vectors = mx.array(text_features(clip, texts))
        weights = l2_normalize(vectors.reshape(len(class_names), len(templates), -1).mean(axis=1))
        scale = mx.exp(clip.network.logit_scale.astype(mx.float32))
        bias = clip.network["logit_bias"].astype(mx.float32) if "logit_bias" in clip.network else None
        mx.eval(weights, scale, bias)
        return cls(tuple(class_names), weights, scale, clip, bias)

    @classmethod
    def from_cache(
        cls, clip: ContrastiveCLIP, class_names: Sequence[str], templates: Sequence[str] = PHOTO
    ) -> "ZeroShotClassifier":
        """Like `build`, but read from the cache if the same weights, tokens, names and templates were built before."""
        texts = _texts(class_names, templates)
        key = [_digest(clip, texts), list(class_names), list(templates)]
        save = lambda folder: cls.build(clip, class_names, templates).save(folder / "classifier.safetensors")
        return cls.load(cached("zero-shot", key, save) / "classifier.safetensors", clip)

    def cosines(self, features: mx.array) -> mx.array:
        """Unit features of images, (B, E), to (B, C): for ranking classes; probabilities may round to equal values."""
        return features @ self.weights.T

    def classify(self, features: mx.array, *, softmax: bool = False) -> mx.array:
        """Unit features of images, (B, E), to probabilities (B, C).

        Those of a CLIP sum to 1. Those of a SigLIP are of each class alone, unless `softmax` compares the classes.
        """
        if self.bias is None or softmax:
            return mx.softmax(self.scale * self.cosines(features), axis=-1)
        return mx.sigmoid(self.scale * self.cosines(features) + self.bias)

    def predict(self, images: Iterable, *, softmax: bool = False) -> mx.array:
        """PIL images or paths to probabilities (B, C), as `classify` has them."""
        return self.classify(self._features(images), softmax=softmax)

    def top_k(self, images: Iterable, labels: Sequence[str]) -> dict[str, float]:
        """Accuracy over images with class names: "top1", "top5", "top1_chance", "top5_chance"."""
        return top_k(self.scores(images), class_labels(self.class_names, labels))

    def scores(self, images: Iterable) -> np.ndarray:
        """PIL images to cosines (B, C)."""
        return np.array(self.cosines(self._features(images)))

    def _features(self, images: Iterable) -> mx.array:
        if self.clip is None:
            raise UserError(
                "this classifier was loaded without a CLIP: pass `clip` to load, or call classify with features"
            )
        return mx.array(image_features(self.clip, as_images(images)))

    def save(self, path: str | Path) -> None:
        """Write weights, scale and class names as one safetensors file."""
        names = {str(i): name for i, name in enumerate(self.class_names)}
        arrays = {"weights": self.weights, "scale": self.scale} | ({} if self.bias is None else {"bias": self.bias})
        write_arrays(Path(path), arrays, **names)

    @classmethod
    def load(cls, path: str | Path, clip: ContrastiveCLIP | None = None) -> "ZeroShotClassifier":
        """Load what `save` wrote; `clip`, the model it was built with, is needed to classify images.

        Raises `UserError` if `path` is missing, damaged, or not a classifier.
        """
        if not Path(path).exists():
            raise UserError(f"{path} does not exist: a classifier is one safetensors file")
        arrays, names = read_arrays(Path(path), return_metadata=True)
        if set(arrays) - {"bias"} != {"weights", "scale"}:
            raise UserError(f"{path} is not a classifier: its arrays are {', '.join(sorted(arrays))}")
        mx.eval(arrays)  # `mx.load` is lazy, and the file may be replaced or deleted later
        classes = tuple(names[str(i)] for i in range(len(arrays["weights"])))
        return cls(classes, arrays["weights"], arrays["scale"], clip, arrays.get("bias"))


def _texts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Each class in each template, checked."""
    if not class_names or not templates:
        raise UserError("a classifier needs at least one class name and one template")
    if any(not name.strip() for name in class_names):
        raise UserError(f"class name {[bool(n.strip()) for n in class_names].index(False) + 1} is empty")
    if twice := [name for i, name in enumerate(class_names) if name in class_names[:i]]:
        raise UserError(f"class names must differ: {twice[0]!r} is repeated")
    if bad := [template for template in templates if "{}" not in template]:
        raise UserError(f"template {bad[0]!r} has no {{}} where the class name goes")
    return [template.replace("{}", name) for name in class_names for template in templates]


def _digest(clip: ContrastiveCLIP, texts: list[str]) -> str:
    """A checksum of the tokens and of all weights but the vision tower's."""
    arrays = {name: a for name, a in tree_flatten(clip.network.parameters()) if not name.startswith("vis")}
    digest = hashlib.sha256(FORMAT + np.array(clip.tokenize(texts)).tobytes())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()
