"""Timer: measures the stages of a run, and ends the run after a given time."""

import time

import attrs
import mlx.core as mx
from attrs.validators import in_, optional

from mlxmm.config import checked
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.training import trainer_config
from mlxmm.training.callback import Callback

STAGES = ("train", "validate", "test", "predict")


@attrs.define(field_transformer=checked)
class Timer(Callback):
    """Ends the run after `duration` (DD:HH:MM:SS, or a timedelta) of training, the time before a resume included.

    The time is checked after every update, or with `interval="epoch"` after every epoch. Validation during training
    counts as training and as validation.
    """

    logs = ()

    duration: str | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(trainer_config.duration_text),
        validator=optional(trainer_config.is_duration),
    )
    interval: str = attrs.field(default="step", validator=in_(("step", "epoch")), kw_only=True)
    stopping_reason: str | None = attrs.field(default=None, init=False)
    _elapsed: dict[str, float] = attrs.field(factory=lambda: dict.fromkeys(STAGES, 0.0), init=False)
    _started: dict[str, float] = attrs.field(factory=dict, init=False)  # start times of the stages that are running

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds spent in "train", "validate", "test" or "predict", in total."""
        if stage not in STAGES:
            raise UserError(f"Timer: unknown stage {stage!r}; choose one of {', '.join(STAGES)}")
        running = time.perf_counter() - self._started[stage] if stage in self._started else 0.0
        return self._elapsed[stage] + running

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds of `duration` left for `stage`; None without a duration."""
        return None if self.duration is None else trainer_config.duration(self.duration) - self.time_elapsed(stage)

    def on_train_start(self, trainer, module):
        self.stopping_reason = None
        self._start("train")
        self._stop_when_late(trainer)  # a resumed run may have no time left

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if self.interval == "step":
            self._stop_when_late(trainer)

    def on_train_epoch_end(self, trainer, module):
        self._stop_when_late(trainer)

    def on_train_end(self, trainer, module):
        self._stop("train")

    def on_validation_start(self, trainer, module):
        self._start("validate")

    def on_validation_end(self, trainer, module, metrics):
        self._stop("validate")

    def on_test_start(self, trainer, module):
        self._start("test")

    def on_test_end(self, trainer, module, metrics):
        self._stop("test")

    def on_predict_start(self, trainer, module):
        self._start("predict")

    def on_predict_end(self, trainer, module):
        self._stop("predict")

    def on_exception(self, trainer, module, exception):
        for stage in list(self._started):
            self._stop(stage)

    def _start(self, stage: str) -> None:
        self._started[stage] = time.perf_counter()

    def _stop(self, stage: str) -> None:
        self._elapsed[stage] = self.time_elapsed(stage)
        del self._started[stage]

    def _stop_when_late(self, trainer) -> None:
        if self.duration is not None:
            late = mx.array(float(self.time_remaining() <= 0))
            # Clocks differ, and a process that stopped alone would leave the others waiting.
            if collectives.all_sum(late).item() > 0:
                trainer.should_stop, self.stopping_reason = True, f"duration={self.duration} is over"

    def state_dict(self):
        return {stage: self.time_elapsed(stage) for stage in STAGES}

    def load_state_dict(self, state):
        self._elapsed = dict(state)
