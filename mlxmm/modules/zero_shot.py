"""ZeroShotClassifier: a linear classifier made of nothing but class names (CLIP, section 3.1.2).

B images, C classes, E features of the shared space.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlxmm.config import UserError
from mlxmm.files import whole_file
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.networks.towers import unit

TEMPLATES = ("a photo of a {}.",)
BATCH = 256  # images or texts at a time


class ZeroShotClassifier:
    """One unit vector a class, built once by the text tower and used for any number of images."""

    def __init__(self, clip: ContrastiveCLIP, class_names: Sequence[str], weights: mx.array):
        self.clip, self.class_names, self.weights = clip, tuple(class_names), weights  # weights (C, E)

    @classmethod
    def build(
        cls, clip: ContrastiveCLIP, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> "ZeroShotClassifier":
        """Average each class's templates in embedding space: unit vectors, their mean, unit again."""
        names = list(class_names)
        if any(not name.strip() for name in names) or len(set(names)) < len(names):
            raise UserError("class names must be different from each other and not empty")
        if bad := [template for template in templates if "{}" not in template]:
            raise UserError(f"template {bad[0]!r} has no {{}} where the class name goes")
        texts = [template.format(name) for name in names for template in templates]
        parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        vectors = mx.concatenate([clip.encode_text(clip.tokenize(part)) for part in parts])
        weights = unit(vectors.reshape(len(names), len(templates), -1).mean(axis=1))
        mx.eval(weights)
        return cls(clip, names, weights)

    def predict(self, images: Sequence) -> mx.array:
        """PIL images to probabilities (B, C)."""
        parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        features = mx.concatenate([self.clip.encode_image(self.clip.preprocess(part)) for part in parts])
        return mx.softmax(mx.exp(self.clip.network.logit_scale) * features @ self.weights.T, axis=-1)

    def accuracy(self, images: Sequence, labels: Sequence[int]) -> float:
        """The fraction of images whose likeliest class is their label."""
        return float((self.predict(images).argmax(-1) == mx.array(labels)).mean())

    def save(self, path: str | Path) -> None:
        """Write vectors and names as one safetensors file."""
        with whole_file(Path(path)) as temporary:
            names = {str(i): name for i, name in enumerate(self.class_names)}
            mx.save_safetensors(str(temporary), {"weights": self.weights}, metadata=names)

    @classmethod
    def load(cls, path: str | Path, clip: ContrastiveCLIP) -> "ZeroShotClassifier":
        """Read what `save` wrote; `clip` is the model it was built with."""
        arrays, names = mx.load(str(path), return_metadata=True)
        ordered = [names[str(i)] for i in range(len(arrays["weights"]))]
        return cls(clip, ordered, arrays["weights"])
