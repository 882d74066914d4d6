"""ZeroShotEvaluation: zero-shot classification from class names after each validation."""

from collections.abc import Sequence

import attrs

from mlxmm.evaluation.prompt_templates import PHOTO
from mlxmm.evaluation.zero_shot import ZeroShotClassifier
from mlxmm.training.callback import Callback


@attrs.define(eq=False)
class ZeroShotEvaluation(Callback):
    """Logs `zero_shot/top1` and `top5` over `images` (PIL), whose class names are `labels`, and chance beside them.

    The classes are `class_names`, by default the distinct labels. A second callback of this class needs another `name`.
    """

    images: Sequence
    labels: Sequence[str]
    class_names: Sequence[str] | None = None
    templates: Sequence[str] = PHOTO
    name: str = "zero_shot"

    def on_validation_end(self, trainer, module, metrics):
        names = self.class_names or list(dict.fromkeys(self.labels))
        figures = ZeroShotClassifier.build(module, names, self.templates).top_k(self.images, self.labels)
        trainer.log({f"{self.name}/{name}": value for name, value in figures.items()})
