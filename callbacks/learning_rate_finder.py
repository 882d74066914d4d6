"""LearningRateFinder: a range test of learning rates (Smith, arXiv 1506.01186, section 3.3) before training."""

import math

import attrs
import mlx.core as mx
import numpy as np
from attrs.validators import ge, gt, in_, optional

from mlxmm.config import plain
from mlxmm.errors import UserError
from mlxmm.training.callback import Callback
from mlxmm.training.trial_updates import restored_after, trial_updates

SMOOTHING = 0.98  # of the loss, as in Lightning


@attrs.define
class LearningRateFinder(Callback):
    """Runs `num_training_steps` updates with learning rates from `min_lr` to `max_lr`, then restores everything.

    `results` holds the rates as "lr" and the smoothed losses as "loss"; `suggestion` is the rate at which the loss
    fell most from one update to the next, or None if too few losses were finite. The search ends early if the loss
    exceeds `early_stop_threshold` times the lowest loss (None: never).

    With `update_optimizer` the run uses the suggestion: as its learning rate, or as the highest rate of its schedule.
    A resumed run uses the earlier suggestion; there is no search then, nor with `fast_dev_run`.
    """

    min_lr: float = attrs.field(default=1e-8, validator=gt(0))
    max_lr: float = attrs.field(default=1.0, validator=gt(0))
    num_training_steps: int = attrs.field(default=100, validator=ge(2), converter=plain)
    mode: str = attrs.field(default="exponential", validator=in_(("exponential", "linear")))
    early_stop_threshold: float | None = attrs.field(default=4.0, validator=optional(gt(0)))
    update_optimizer: bool = attrs.field(default=False, kw_only=True)
    results: dict[str, list[float]] = attrs.field(factory=dict, init=False)
    suggestion: float | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self):
        if self.min_lr >= self.max_lr:
            raise UserError(f"min_lr={self.min_lr} must be below max_lr={self.max_lr}")

    def on_fit_start(self, trainer, module):
        if trainer.config.fast_dev_run:
            return
        if trainer.global_step == 0:
            self.results = self._search(trainer)
            self.suggestion = steepest(**self.results)
        if self.update_optimizer and self.suggestion is not None:
            set_highest_rate(trainer, self.suggestion)

    def _search(self, trainer) -> dict[str, list[float]]:
        if not hasattr(trainer.optimizer, "learning_rate") or "states" in trainer.optimizer.state:
            raise UserError(
                f"LearningRateFinder needs an optimizer with one learning rate, not {type(trainer.optimizer).__name__}"
            )
        rates, losses, mean = self._rates(), [], 0.0
        with restored_after(trainer):
            table = mx.array(rates)
            trainer.optimizer._maybe_schedule("learning_rate", lambda step: table[step])
            for metrics in trial_updates(trainer, len(rates)):
                mean = SMOOTHING * mean + (1 - SMOOTHING) * metrics["loss"].item()
                losses.append(mean / (1 - SMOOTHING ** (len(losses) + 1)))
                if self._diverges(losses):
                    break
        return {"lr": rates[: len(losses)], "loss": losses}

    def _rates(self) -> list[float]:
        space = np.geomspace if self.mode == "exponential" else np.linspace
        return space(self.min_lr, self.max_lr, self.num_training_steps).tolist()

    def _diverges(self, losses: list[float]) -> bool:
        if not math.isfinite(losses[-1]):
            return True
        threshold = self.early_stop_threshold
        return threshold is not None and len(losses) > 2 and losses[-1] > threshold * min(losses)

    def state_dict(self):
        return {"suggestion": self.suggestion}

    def load_state_dict(self, state):
        self.suggestion = state["suggestion"]


def steepest(lr: list[float], loss: list[float], skip_begin: int = 10, skip_end: int = 1) -> float | None:
    """The rate at which the loss falls most from one update to the next, without the margins (as in Lightning).

    None if fewer than two finite losses remain.
    """
    kept = [i for i in range(skip_begin, len(loss) - skip_end) if math.isfinite(loss[i])]
    if len(kept) < 2:
        return None
    return lr[kept[int(np.gradient([loss[i] for i in kept]).argmin())]]


def set_highest_rate(trainer, rate: float) -> None:
    """Set the optimizer's learning rate to `rate`, or scale its schedule so that its highest rate is `rate`."""
    optimizer = trainer.optimizer
    schedule = optimizer._schedulers.get("learning_rate")
    if schedule is None:
        optimizer.learning_rate = rate
        return
    highest = schedule(mx.arange(trainer.estimated_stepping_batches)).max().item()
    optimizer._maybe_schedule("learning_rate", lambda step: schedule(step) * (rate / highest))
