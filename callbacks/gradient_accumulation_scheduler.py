"""GradientAccumulationScheduler: the number of batches per update, from given epochs on."""

from collections.abc import Mapping

import attrs

from mlxmm.config import checked
from mlxmm.errors import UserError
from mlxmm.training.callback import Callback


def _is_schedule(instance, attribute, value) -> None:
    """A mapping of at least one epoch, counted from 0, to its number of batches per update."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    if not pairs or not all(isinstance(n, int) and n >= least for pair in pairs for n, least in zip(pair, (0, 1))):
        raise UserError(f"GradientAccumulationScheduler needs {{epoch: batches per update}}, like {{4: 2}}: {value!r}")


@attrs.define(field_transformer=checked)
class GradientAccumulationScheduler(Callback):
    """`GradientAccumulationScheduler({0: 4, 5: 1})`: four batches make an update until epoch 5, then one.

    Before the first epoch named, every batch is an update. `estimated_stepping_batches`, and so the optimizer's
    schedule and the progress bar, take this into account.
    """

    scheduling: Mapping[int, int] = attrs.field(validator=_is_schedule)

    def setup(self, trainer, module, stage):
        if (own := trainer.config.accumulate_grad_batches) != 1:
            raise UserError(f"accumulate_grad_batches={own} and GradientAccumulationScheduler: choose one of them")
        if stage == "fit":
            trainer.schedule.accumulation = self.scheduling

    def on_train_epoch_start(self, trainer, module):
        trainer.accumulate(trainer.schedule.accumulation_in(trainer.current_epoch))
