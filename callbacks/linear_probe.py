"""LinearProbe: the accuracy of a linear classifier on the vision tower's features, when training ends."""

from collections.abc import Sequence

import attrs

from mlxmm.config import checked
from mlxmm.evaluation.clip_features import probe
from mlxmm.training.callback import Callback


@attrs.define(eq=False, field_transformer=checked)
class LinearProbe(Callback):
    """Logs `linear_probe/accuracy`, chance for it and the "C" that was chosen. Needs scikit-learn (mlxmm[probe]).

    Each part is a sequence of (PIL image, label): `train` to fit, `val` to choose the regularisation, `test` to score.
    """

    train: Sequence
    val: Sequence
    test: Sequence

    def on_train_end(self, trainer, module):
        figures = probe(module, self.train, self.val, self.test)
        trainer.log({f"linear_probe/{name}": value for name, value in figures.items()})
