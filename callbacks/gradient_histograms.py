"""GradientHistograms: how the gradients are distributed."""

import attrs
from attrs.validators import ge

from mlxmm.config import checked
from mlxmm.training.callback import Callback

from .weight_histograms import log_histograms


@attrs.define(field_transformer=checked)
class GradientHistograms(Callback):
    """Every `every_n_steps` updates, logs a histogram "gradients/<name>" of each array's gradient, not yet clipped.

    Seeing gradients splits the compiled update in two, which makes every update slower. With strategy fsdp they are
    those of the first process's part.
    """

    every_n_steps: int = attrs.field(default=100, validator=ge(1))

    def on_before_optimizer_step(self, trainer, module, grads):
        step = trainer.global_step + 1  # that of the update in hand
        if trainer.loggers and step % self.every_n_steps == 0:
            log_histograms(trainer, "gradients", grads, step)
