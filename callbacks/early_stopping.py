"""EarlyStopping: ends a run whose metric no longer improves."""

import math

import attrs
from attrs.validators import ge, in_

from mlxmm.config import checked
from mlxmm.errors import UserError
from mlxmm.training.callback import Callback
from mlxmm.training.monitors import check_monitor, validates, without_validation


@attrs.define(field_transformer=checked)
class EarlyStopping(Callback):
    """Ends the run once `monitor` has not improved by more than `min_delta` for `patience` validations in a row.

    A validation counts if `monitor` was logged since the last one. Without validation data, epochs count. The run ends
    at once if the metric is not finite (`check_finite`), better than `stopping_threshold`, or worse than
    `divergence_threshold`; `stopping_reason` says why. A stopped run that is resumed stays stopped, unless these
    settings have changed. Raises `UserError` if nothing logs `monitor`.
    """

    reads_metrics = True
    logs = ()

    monitor: str
    min_delta: float = attrs.field(default=0.0, validator=ge(0), kw_only=True)
    patience: int = attrs.field(default=3, validator=ge(0), kw_only=True)
    mode: str = attrs.field(default="min", validator=in_(("min", "max")), kw_only=True)
    check_finite: bool = attrs.field(default=True, kw_only=True)
    stopping_threshold: float | None = attrs.field(default=None, kw_only=True)
    divergence_threshold: float | None = attrs.field(default=None, kw_only=True)
    best_score: float | None = attrs.field(default=None, init=False)
    wait_count: int = attrs.field(default=0, init=False)  # validations since the best one
    stopping_reason: str | None = attrs.field(default=None, init=False)
    _counted_at: int = attrs.field(default=-1, init=False)  # the step at which the newest counted value was logged
    _fitting: bool = attrs.field(default=False, init=False)
    _validates: bool = attrs.field(default=True, init=False)

    def setup(self, trainer, module, stage):
        self._fitting = stage == "fit" and not trainer.config.fast_dev_run
        if self._fitting:
            self.stopping_reason, self._validates = None, validates(trainer)
            if fault := without_validation("EarlyStopping", self.monitor, self._validates):
                raise UserError(fault)

    def on_train_start(self, trainer, module):
        trainer.should_stop |= self.stopping_reason is not None

    def on_validation_end(self, trainer, module, metrics):
        if self._fitting:
            self._check(trainer)

    def on_train_epoch_end(self, trainer, module):
        if self._fitting and not self._validates:
            self._check(trainer)

    def _check(self, trainer) -> None:
        check_monitor(trainer, "EarlyStopping", self.monitor)
        logged_at = trainer.logged_at.get(self.monitor, -1)
        if logged_at <= self._counted_at:
            return
        self._counted_at, score = logged_at, trainer.callback_metrics[self.monitor]
        self._count(score)
        if reason := self._reason(score):
            self.stopping_reason = reason
            trainer.should_stop = True

    def _count(self, score: float) -> None:
        sign = 1 if self.mode == "min" else -1
        if self._is_better(score + sign * self.min_delta, self.best_score):
            self.best_score, self.wait_count = score, 0
        else:
            self.wait_count += 1

    def _reason(self, score: float) -> str | None:
        told, stop, diverged = f"{self.monitor} = {score:.6g}", self.stopping_threshold, self.divergence_threshold
        if self.check_finite and not math.isfinite(score):
            return f"{told} is not finite"
        if stop is not None and self._is_better(score, stop):
            return f"{told} is better than stopping_threshold={stop}"
        if diverged is not None and self._is_better(diverged, score):
            return f"{told} is worse than divergence_threshold={diverged}"
        counted = "validations" if self._validates else "epochs"
        if self.wait_count and self.wait_count >= self.patience:
            return f"{self.monitor} did not improve in {self.wait_count} {counted}; the best was {self.best_score:.6g}"
        return None

    def _is_better(self, score: float, than: float | None) -> bool:
        """Whether `score` is better than another one (None: any score is). NaN is never better."""
        if self.mode == "min":
            return score < (math.inf if than is None else than)
        return score > (-math.inf if than is None else than)

    @property
    def state_key(self):
        return f"EarlyStopping({self.monitor}, {self.mode})"

    def _settings(self) -> list:
        return [self.min_delta, self.patience, self.check_finite, self.stopping_threshold, self.divergence_threshold]

    def state_dict(self):
        names = ("best_score", "wait_count", "stopping_reason")
        state = {name: getattr(self, name) for name in names}
        return state | {"counted_at": self._counted_at, "settings": self._settings()}

    def load_state_dict(self, state):
        self.best_score, self.wait_count = state["best_score"], state["wait_count"]
        self._counted_at = state["counted_at"]
        if state["settings"] == self._settings():
            self.stopping_reason = state["stopping_reason"]
