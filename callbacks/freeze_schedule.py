"""FreezeSchedule: which parameters are trainable from which epoch or update on."""

from collections.abc import Mapping, Sequence
from numbers import Integral

import attrs
from attrs.validators import in_
from mlx.utils import tree_flatten

from mlxmm.config import checked
from mlxmm.errors import UserError
from mlxmm.training.callback import Callback
from mlxmm.training.trainable import match_parameters, set_trainable


def _is_schedule(instance, attribute, value) -> None:
    """A mapping of at least one epoch or update to what is trained from there on."""
    if not value or not all(isinstance(start, Integral) and start >= 0 for start in value):
        raise UserError(f"FreezeSchedule needs {{epoch or update: parts}}, like {{0: 'projector'}}: {value!r}")


@attrs.define(field_transformer=checked)
class FreezeSchedule(Callback):
    """`FreezeSchedule({0: "projector", 2: ("projector", "language_model.model.layers[-2:]")})`.

    The projector is trained from epoch 0 on, the last two layers also from epoch 2 on; everything else is frozen. With
    `unit="step"` the numbers count updates. A module may name groups of parameters: "lora" are the adapters of a
    Qwen3Aligner. Quantized weights stay frozen. A name that matches no parameter raises `UserError` before training.
    What is trainable is a function of the epoch or update, so it is right after a resume.

    Logs "schedule/num_trainable" with the training metrics, and as text which parts are trained when a stage begins.
    """

    stages: Mapping[int, str | Sequence[str]] = attrs.field(validator=_is_schedule)
    unit: str = attrs.field(default="epoch", validator=in_(("epoch", "step")), kw_only=True)
    _names: dict[int, list[str]] = attrs.field(factory=dict, init=False)
    _sizes: dict[str, int] = attrs.field(factory=dict, init=False)  # of whole arrays, before they are sharded
    _current: int | None = attrs.field(default=None, init=False)

    def setup(self, trainer, module, stage):
        if stage == "fit":  # before the optimizer exists, so that it has moments for trainable parameters only
            self._names = {start: self._match(module, stage) for start, stage in self.stages.items()}
            self._sizes = {name: array.size for name, array in tree_flatten(module.parameters())}
            self._current = None
            self._apply(trainer, module)

    def on_train_epoch_start(self, trainer, module):
        self._apply(trainer, module)
        if self.unit == "epoch" and trainer.batch_idx == 0:
            self._log_stage(trainer, trainer.current_epoch)

    def on_train_batch_start(self, trainer, module, batches):
        if self.unit == "step":
            self._apply(trainer, module)
            self._log_stage(trainer, trainer.global_step)

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if self._current is not None and trainer.global_step % trainer.config.log_every_n_steps == 0:
            num_trainable = float(sum(map(self._sizes.get, self._names[self._current])))
            for logger in trainer.loggers:  # a mark, no result
                logger.log_metrics(
                    {"schedule/num_trainable": num_trainable}, trainer.global_step, trainer.current_epoch
                )

    def _log_stage(self, trainer, now: int) -> None:
        """Say which parts are trained from now on, if a stage begins just now."""
        stage = self.stages.get(now, ())
        parts = [stage] if isinstance(stage, str) else stage
        for logger in trainer.loggers if parts else ():
            logger.log_text("schedule/trainable", f"from {self.unit} {now}: {', '.join(parts)}", trainer.global_step)

    def _apply(self, trainer, module) -> None:
        now = trainer.current_epoch if self.unit == "epoch" else trainer.global_step
        begun = [start for start in self._names if start <= now]
        if begun and max(begun) != self._current:
            self._current = start = max(begun)
            self._names[start] = self._match(module, self.stages[start])  # a callback may have replaced a part
            self._sizes = {name: array.size for name, array in tree_flatten(module.parameters())} | self._sizes
            set_trainable(module, self._names[start])

    @staticmethod
    def _match(module, stage: str | Sequence[str]) -> list[str]:
        patterns = [stage] if isinstance(stage, str) else stage
        return [name for pattern in patterns for name in match_parameters(module, pattern)]
