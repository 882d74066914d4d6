"""LinearProbe: what a linear classifier makes of the vision tower's features, when training ends."""

from collections.abc import Sequence

import attrs

from mlxmm.evaluation.clip_features import probe
from mlxmm.training.callback import Callback


@attrs.define(eq=False)
class LinearProbe(Callback):
    """Logs `linear_probe/accuracy`, chance for it and the "C" that was chosen. Needs scikit-learn (mlxmm[probe]).

    Each part is a sequence of (PIL image, label): `train` fits, `val` chooses the regularisation, `test` is judged.
    """

    train: Sequence
    val: Sequence
    test: Sequence

    def on_train_end(self, trainer, module):
        figures = probe(module, self.train, self.val, self.test)
        trainer.log({f"linear_probe/{name}": value for name, value in figures.items()})
