"""ZeroShotClassifier: a linear classifier made of nothing but class names (CLIP, section 3.1.2).

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
from mlxmm.storage.atomic import read_arrays
from mlxmm.storage.cache import cached
from mlxmm.storage.pretrained import write_arrays


@attrs.frozen(eq=False)
class ZeroShotClassifier:
    """One unit vector a class, built once by the text tower and used for any number of images.

    `weights` is (C, E), `scale` what cosines are multiplied with. Features need no `clip`; images do.
    """

    class_names: tuple[str, ...]
    weights: mx.array
    scale: mx.array
    clip: ContrastiveCLIP | None = None

    @classmethod
    def build(
        cls, clip: ContrastiveCLIP, class_names: Sequence[str], templates: Sequence[str] = PHOTO
    ) -> "ZeroShotClassifier":
        """Average each class's templates in embedding space: unit vectors, their mean, unit again.

        Raises `UserError` for class names that are empty or the same, and for templates without {}.
        """
        texts = _texts(class_names, templates)
        vectors = mx.array(text_features(clip, texts))
        weights = l2_normalize(vectors.reshape(len(class_names), len(templates), -1).mean(axis=1))
        scale = mx.exp(clip.network.logit_scale.astype(mx.float32))
        mx.eval(weights, scale)
        return cls(tuple(class_names), weights, scale, clip)

    @classmethod
    def from_cache(
        cls, clip: ContrastiveCLIP, class_names: Sequence[str], templates: Sequence[str] = PHOTO
    ) -> "ZeroShotClassifier":
        """What `build` made of the same weights, tokens, names and templates earlier, or makes and keeps now."""
        texts = _texts(class_names, templates)
        key = [_digest(clip, texts), list(class_names), list(templates)]
        save = lambda folder: cls.build(clip, class_names, templates).save(folder / "classifier.safetensors")
        return cls.load(cached("zero-shot", key, save) / "classifier.safetensors", clip)

    def cosines(self, features: mx.array) -> mx.array:
        """Unit features of images, (B, E), to (B, C): what to rank classes by, finer than probabilities."""
        return features @ self.weights.T

    def classify(self, features: mx.array) -> mx.array:
        """Unit features of images, (B, E), to probabilities (B, C)."""
        return mx.softmax(self.scale * self.cosines(features), axis=-1)

    def predict(self, images: Iterable) -> mx.array:
        """PIL images to probabilities (B, C)."""
        return self.classify(self._features(images))

    def top_k(self, images: Iterable, labels: Sequence[str]) -> dict[str, float]:
        """Accuracy over images with class names: "top1", "top5", "top1_chance", "top5_chance"."""
        cosines = np.array(self.cosines(self._features(images)))
        return top_k(cosines, class_labels(self.class_names, labels))

    def _features(self, images: Iterable) -> mx.array:
        if self.clip is None:
            raise UserError("this classifier was loaded without a clip: it takes features (classify), not images")
        return mx.array(image_features(self.clip, images))

    def save(self, path: str | Path) -> None:
        """Write vectors, scale and names as one safetensors file."""
        names = {str(i): name for i, name in enumerate(self.class_names)}
        write_arrays(Path(path), {"weights": self.weights, "scale": self.scale}, **names)

    @classmethod
    def load(cls, path: str | Path, clip: ContrastiveCLIP | None = None) -> "ZeroShotClassifier":
        """Read what `save` wrote; `clip` is the model it was built with, if images are to be classified too."""
        if not Path(path).exists():
            raise UserError(f"{path} is not there: a classifier is one safetensors file")
        arrays, names = read_arrays(Path(path), return_metadata=True)
        if set(arrays) != {"weights", "scale"}:
            raise UserError(f"{path} holds no classifier: its arrays are {', '.join(sorted(arrays))}")
        mx.eval(arrays)  # `mx.load` is lazy, and the file may be replaced or deleted later
        return cls(
            tuple(names[str(i)] for i in range(len(arrays["weights"]))), arrays["weights"], arrays["scale"], clip
        )


def _texts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Each class in each template, checked."""
    if not class_names or not templates:
        raise UserError("a classifier needs at least one class name and one template")
    if any(not name.strip() for name in class_names):
        raise UserError(f"class name {[bool(n.strip()) for n in class_names].index(False) + 1} is empty")
    if twice := [name for i, name in enumerate(class_names) if name in class_names[:i]]:
        raise UserError(f"class names must be different from each other: {twice[0]!r} is there twice")
    if bad := [template for template in templates if "{}" not in template]:
        raise UserError(f"template {bad[0]!r} has no {{}} where the class name goes")
    return [template.replace("{}", name) for name in class_names for template in templates]


def _digest(clip: ContrastiveCLIP, texts: list[str]) -> str:
    """A checksum of what the text tower is, and of the tokens it would read: all but the vision tower's weights."""
    arrays = {name: a for name, a in tree_flatten(clip.network.parameters()) if not name.startswith("vis")}
    digest = hashlib.sha256(np.array(clip.tokenize(texts)).tobytes())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()
