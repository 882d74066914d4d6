"""ZeroShotEvaluation: zero-shot classification from class names after each validation."""

from collections.abc import Sequence

import attrs
import numpy as np

from mlxmm.config import checked
from mlxmm.evaluation.heat_map import heat_map
from mlxmm.evaluation.prompt_templates import PHOTO
from mlxmm.evaluation.retrieval import class_labels, confusion, top_k
from mlxmm.evaluation.zero_shot import ZeroShotClassifier
from mlxmm.training.callback import Callback

MAX_CLASSES = 100
TITLE = "pictures counted: rows are their classes, columns what they are taken for; framed: the most frequent"


@attrs.define(eq=False, field_transformer=checked)
class ZeroShotEvaluation(Callback):
    """Logs `zero_shot/top1` and `top5` over `images` (PIL), whose class names are `labels`, and chance beside them.

    Of at most `MAX_CLASSES` classes it also logs a picture of which are taken for which: `zero_shot/confusion`.

    The classes are `class_names`, by default the distinct labels. A second callback of this class needs another `name`.
    """

    images: Sequence
    labels: Sequence[str]
    class_names: Sequence[str] | None = None
    templates: Sequence[str] = PHOTO
    name: str = "zero_shot"

    def on_validation_end(self, trainer, module, metrics):
        names = self.class_names or list(dict.fromkeys(self.labels))
        scores = ZeroShotClassifier.build(module, names, self.templates).scores(self.images)
        relevant = class_labels(names, self.labels)
        trainer.log({f"{self.name}/{name}": value for name, value in top_k(scores, relevant).items()})
        if len(names) <= MAX_CLASSES:
            self._log_confusion(trainer, names, confusion(scores, relevant))

    def _log_confusion(self, trainer, names: Sequence[str], counts: np.ndarray) -> None:
        picture = np.asarray(heat_map(counts, names, TITLE, "{:.0f}"))
        for logger in trainer.loggers:
            logger.log_images(f"{self.name}/confusion", picture[None], trainer.global_step)
