"""SimilarityMatrix: how similar each of a few images is to each of their captions, as a picture."""

from collections.abc import Sequence

import attrs
import numpy as np
from attrs.validators import ge

from mlxmm.config import checked
from mlxmm.evaluation.clip_features import image_features, text_features
from mlxmm.evaluation.heat_map import heat_map
from mlxmm.training.callback import Callback

TITLE = (
    "cosines: rows are pictures, columns their captions; framed: the most similar caption. Pairs are on the diagonal"
)


@attrs.define(eq=False, field_transformer=checked)
class SimilarityMatrix(Callback):
    """After each validation, logs the cosines between the first `num_samples` images of `rows` and their captions.

    `rows` are `{"image": PIL, "captions": [str]}`; of several captions, the first is taken. Every rank computes them,
    since the layers of strategy fsdp are gathered by all; rank 0 writes.
    """

    rows: Sequence
    num_samples: int = attrs.field(default=16, validator=ge(2), kw_only=True)
    name: str = attrs.field(default="val/similarity", kw_only=True)

    def on_validation_end(self, trainer, module, metrics):
        rows = [self.rows[i] for i in range(min(self.num_samples, len(self.rows)))]
        images, captions = [row["image"] for row in rows], [row["captions"][0] for row in rows]
        cosines = image_features(module, images) @ text_features(module, captions).T
        picture = np.asarray(heat_map(cosines, captions, TITLE, "{:.2f}", images))
        for logger in trainer.loggers:
            logger.log_images(self.name, picture[None], trainer.global_step)
