"""WeightHistograms: how the trainable weights are distributed."""

import attrs
import mlx.core as mx
import numpy as np
from attrs.validators import ge
from mlx.utils import tree_flatten

from mlxmm.config import checked
from mlxmm.training.callback import Callback


@attrs.define(field_transformer=checked)
class WeightHistograms(Callback):
    """Every `every_n_steps` updates, logs a histogram "weights/<name>" of each array that is trainable.

    With strategy fsdp it is that of the first process's part.
    """

    every_n_steps: int = attrs.field(default=100, validator=ge(1))

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.loggers and trainer.global_step % self.every_n_steps == 0:
            log_histograms(trainer, "weights", module.trainable_parameters(), trainer.global_step)


def log_histograms(trainer, kind: str, arrays: dict, step: int) -> None:
    """Log a histogram "<kind>/<name>" of each array in a tree."""
    for name, array in tree_flatten(arrays):
        values = np.array(array.astype(mx.float32))
        for logger in trainer.loggers:
            logger.log_histogram(f"{kind}/{name}", values, step)
