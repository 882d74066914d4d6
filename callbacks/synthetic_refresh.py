"""SyntheticRefresh: replaces the training rows by new synthetic ones, or their captions, during training."""

from collections.abc import Callable, Sequence

import attrs
from attrs.validators import ge

from mlxmm.training.callback import Callback


@attrs.define
class SyntheticRefresh(Callback):
    """Before every `every_n_epochs`-th epoch, replaces the training rows by `make_rows(epoch)`.

    `make_rows` must give the same rows for an epoch when a resumed run calls it again: a function of the epoch, or a
    `CaptionRefresh`, which writes new captions and keeps them. Its `metrics`, if it has any, are logged.
    """

    make_rows: Callable[[int], Sequence]
    every_n_epochs: int = attrs.field(default=1, validator=ge(1), kw_only=True)

    def on_train_epoch_start(self, trainer, module):
        epoch = trainer.current_epoch - trainer.current_epoch % self.every_n_epochs
        trainer.datamodule.replace_rows("train", self.make_rows(epoch))
        if metrics := getattr(self.make_rows, "metrics", None):
            trainer.log(metrics)
