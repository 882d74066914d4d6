"""EmbeddingProjector: features of images and captions for TensorBoard's projector."""

from collections.abc import Sequence

import attrs
import numpy as np
from attrs.validators import ge
from PIL import Image, ImageOps

from mlxmm.config import checked
from mlxmm.evaluation.clip_features import image_features, text_features
from mlxmm.training.callback import Callback

SIDE = 48  # pixels of a thumbnail


@attrs.define(eq=False, field_transformer=checked)
class EmbeddingProjector(Callback):
    """At the end of training, logs the features of the first `num_samples` images of `rows` and of their captions.

    In the tab "Projector", each point is labelled with its kind and its caption; that of a caption shows the picture
    that it belongs to, paler. `rows` are `{"image": PIL, "captions": [str]}`.
    """

    rows: Sequence
    num_samples: int = attrs.field(default=256, validator=ge(1), kw_only=True)
    name: str = attrs.field(default="embeddings", kw_only=True)

    def on_train_end(self, trainer, module):
        rows = [self.rows[i] for i in range(min(self.num_samples, len(self.rows)))]
        captions = [row["captions"][0] for row in rows]
        vectors = np.concatenate([image_features(module, (r["image"] for r in rows)), text_features(module, captions)])
        labels = [(kind, " ".join(text.split())) for kind in ("picture", "caption") for text in captions]
        pictures = np.stack([_thumbnail(row["image"]) for row in rows])
        paler = (0.4 * pictures + 0.6 * 255).astype(np.uint8)
        for logger in trainer.loggers:
            both = np.concatenate([pictures, paler])
            logger.log_embedding(self.name, vectors, ("kind", "caption"), labels, both, trainer.global_step)


def _thumbnail(image: Image.Image) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: the image in its proportions."""
    return np.asarray(ImageOps.pad(image.convert("RGB"), (SIDE, SIDE), color="white"))
