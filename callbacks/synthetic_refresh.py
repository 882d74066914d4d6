"""SyntheticRefresh: new synthetic rows while training goes on."""

from collections.abc import Callable, Sequence

import attrs
from attrs.validators import ge

from mlxmm.training.callback import Callback


@attrs.define
class SyntheticRefresh(Callback):
    """Before every `every_n_epochs`-th epoch, trains on the rows that `make_rows(epoch)` gives.

    `make_rows` must be a function of the epoch: a resumed run asks for the same rows again.
    """

    make_rows: Callable[[int], Sequence]
    every_n_epochs: int = attrs.field(default=1, validator=ge(1), kw_only=True)

    def on_train_epoch_start(self, trainer, module):
        epoch = trainer.current_epoch - trainer.current_epoch % self.every_n_epochs
        trainer.datamodule.replace_rows("train", self.make_rows(epoch))
