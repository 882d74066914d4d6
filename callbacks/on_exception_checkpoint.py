"""OnExceptionCheckpoint: saves a checkpoint when a run fails."""

from pathlib import Path

import attrs
import mlx.core as mx
from attrs.validators import min_len

from mlxmm.config import checked
from mlxmm.errors import warn
from mlxmm.training.callback import Callback


@attrs.define(field_transformer=checked)
class OnExceptionCheckpoint(Callback):
    """Saves `dirpath/filename` when any exception ends `fit`; a checkpoint of that name is replaced.

    Nothing is saved, with a warning, if the exception was raised in the middle of an update that had already changed
    the weights: a resumed run could not be exact. The checkpoint is never deleted.
    """

    saves_checkpoints = True

    dirpath: Path = attrs.field(converter=Path)
    filename: str = attrs.field(default="on_exception", validator=min_len(1))
    _fitting: bool = attrs.field(default=False, init=False)
    _begun_at: int | None = attrs.field(default=None, init=False)  # the update that started last
    _counter: mx.array | None = attrs.field(default=None, init=False)  # the optimizer's, before it

    @property
    def ckpt_path(self) -> Path:
        """The folder of the checkpoint."""
        return self.dirpath / self.filename

    def setup(self, trainer, module, stage):
        self._fitting, self._begun_at = False, None

    def on_fit_start(self, trainer, module):
        self._fitting = True

    def on_train_batch_start(self, trainer, module, batches):
        self._begun_at, self._counter = trainer.global_step, _counter(trainer.optimizer)

    def on_fit_end(self, trainer, module):
        self._fitting = False

    def on_exception(self, trainer, module, exception):
        if not self._fitting:
            return
        if self._begun_at == trainer.global_step and _counter(trainer.optimizer) is not self._counter:
            warn(f"{self.ckpt_path} is not saved: an update was incomplete")
            return
        try:
            trainer.save_checkpoint(self.ckpt_path)
        except Exception as error:  # noqa: BLE001 the exception that ended the run must not be hidden by this one
            warn(f"{self.ckpt_path} could not be saved: {error}")


def _counter(optimizer) -> mx.array:
    """The step count of an optimizer: every update replaces this array."""
    return getattr(optimizer, "optimizers", [optimizer])[0].state["step"]
