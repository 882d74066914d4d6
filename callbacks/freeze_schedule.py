"""FreezeSchedule: which parameters are trainable from which epoch or update on."""

from collections.abc import Mapping, Sequence

import attrs
from attrs.validators import in_

from mlxmm.training.callback import Callback
from mlxmm.training.trainable import match_parameters, set_trainable


@attrs.define
class FreezeSchedule(Callback):
    """`FreezeSchedule({0: "projector", 2: ("projector", "language_model.model.layers[-2:]")})`.

    The projector is trained from epoch 0 on, the last two layers also from epoch 2 on; everything else is frozen. With
    `unit="step"` the numbers count updates. A module may name groups of parameters: "lora" are the adapters of a
    Qwen3Aligner. Quantized weights stay frozen. A name that matches no parameter raises `UserError` before training.
    What is trainable is a function of the epoch or update, so it is right after a resume.
    """

    stages: Mapping[int, str | Sequence[str]]
    unit: str = attrs.field(default="epoch", validator=in_(("epoch", "step")), kw_only=True)
    _names: dict[int, list[str]] = attrs.field(factory=dict, init=False)
    _current: int | None = attrs.field(default=None, init=False)

    def setup(self, trainer, module, stage):
        if stage == "fit":  # before the optimizer exists, so that it has moments for trainable parameters only
            self._names = {start: self._match(module, stage) for start, stage in self.stages.items()}
            self._current = None
            self._apply(trainer, module)

    def on_train_epoch_start(self, trainer, module):
        self._apply(trainer, module)

    def on_train_batch_start(self, trainer, module, batches):
        if self.unit == "step":
            self._apply(trainer, module)

    def _apply(self, trainer, module) -> None:
        now = trainer.current_epoch if self.unit == "epoch" else trainer.global_step
        begun = [start for start in self._names if start <= now]
        if begun and max(begun) != self._current:
            self._current = max(begun)
            set_trainable(module, self._names[self._current])

    @staticmethod
    def _match(module, stage: str | Sequence[str]) -> list[str]:
        patterns = [stage] if isinstance(stage, str) else stage
        return [name for pattern in patterns for name in match_parameters(module, pattern)]
