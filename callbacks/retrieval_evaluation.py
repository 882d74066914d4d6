"""RetrievalEvaluation: text-to-image and image-to-text retrieval after each validation."""

from collections.abc import Sequence

import attrs

from mlxmm.config import checked
from mlxmm.evaluation.clip_features import retrieve
from mlxmm.training.callback import Callback


@attrs.define(eq=False, field_transformer=checked)
class RetrievalEvaluation(Callback):
    """Logs `retrieval/image_to_text/recall_at_1` and so on over `rows`, `{"image": PIL, "captions": [str]}`.

    All captions of all images are candidates; chance is logged beside each metric. A second callback of this class
    needs another `name`.
    """

    rows: Sequence
    name: str = "retrieval"

    def on_validation_end(self, trainer, module, metrics):
        trainer.log({f"{self.name}/{name}": value for name, value in retrieve(module, self.rows).items()})
