"""SyntheticRefresh: replaces the training rows by new synthetic ones, or their captions, during training."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs
import numpy as np
from attrs.validators import ge

from mlxmm.config import checked
from mlxmm.training.callback import Callback

NUM_SAMPLES = 8


@runtime_checkable
class VersionedRows(Protocol):
    """Rows by epoch that come in versions, as those of `CaptionRefresh`."""

    metrics: dict[str, float]  # of the newest epoch, to be logged

    def __call__(self, epoch: int) -> Sequence:
        """The rows to train `epoch` on."""

    def advance(self, step: int) -> None:
        """`step` updates are done."""

    def samples(self, most: int) -> list[tuple[Any, str, str]]:
        """(picture, old caption, new caption), where the newest epoch has a new version."""

    def state_dict(self) -> dict:
        """The version, as JSON values."""

    def load_state_dict(self, state: dict) -> None:
        """Raise `UserError` if that version is not there any more."""


@attrs.define(field_transformer=checked)
class SyntheticRefresh(Callback):
    """Before every `every_n_epochs`-th epoch, replaces the training rows by `make_rows(epoch)`.

    `make_rows` must give the same rows for an epoch when a resumed run calls it again: a function of the epoch, or
    `VersionedRows` as a `CaptionRefresh`, which writes new captions and keeps them. Of these, checkpoints hold the
    version, and metrics and samples are logged at the start of each epoch; of a function, its `epoch` is, as
    "refresh/epoch".
    """

    make_rows: Callable[[int], Sequence]
    every_n_epochs: int = attrs.field(default=1, validator=ge(1), kw_only=True)
    _versions: VersionedRows | None = attrs.field(init=False)
    _rows: Sequence | None = attrs.field(default=None, init=False)  # the newest

    def __attrs_post_init__(self):
        self._versions = self.make_rows if isinstance(self.make_rows, VersionedRows) else None

    def on_train_start(self, trainer, module):
        self._rows = None
        self._advance(trainer)

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self._advance(trainer)

    def on_train_epoch_start(self, trainer, module):
        epoch = trainer.current_epoch - trainer.current_epoch % self.every_n_epochs
        rows = self.make_rows(epoch)
        if rows is not self._rows:  # the same rows may have features that a callback has cached
            trainer.datamodule.replace_rows("train", rows)
        self._rows = rows
        if trainer.batch_idx == 0:  # a run resumed within the epoch has logged it
            self._log_rows(trainer, epoch)
            self._log_samples(trainer, module)

    def state_dict(self):
        return {} if self._versions is None else self._versions.state_dict()

    def load_state_dict(self, state):
        if self._versions is not None and state:
            self._versions.load_state_dict(state)

    def _advance(self, trainer) -> None:
        if self._versions is not None:
            self._versions.advance(trainer.global_step)

    def _log_rows(self, trainer, epoch: int) -> None:
        if self._versions is not None:
            trainer.log(self._versions.metrics)
        for logger in trainer.loggers if self._versions is None else ():  # a mark, no result
            logger.log_metrics({"refresh/epoch": float(epoch)}, trainer.global_step, trainer.current_epoch)

    def _log_samples(self, trainer, module) -> None:
        samples = self._versions.samples(NUM_SAMPLES) if self._versions and trainer.loggers else []
        if not samples:
            return
        table = [(i, old, new) for i, (_, old, new) in enumerate(samples)]
        pixels = np.stack([module.processor.pixels(image) for image, _, _ in samples])
        for logger in trainer.loggers:
            logger.log_images("refresh/samples", pixels, trainer.global_step)
            logger.log_table("refresh/samples", ("", "old", "new"), table, trainer.global_step)
