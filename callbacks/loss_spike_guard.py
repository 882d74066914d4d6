"""LossSpikeGuard: undoes an update that is not finite or whose loss is a spike, or ends the run there."""

import math

import attrs
from attrs.validators import ge, in_, optional

from mlxmm.compute.compiled import snapshot
from mlxmm.config import checked
from mlxmm.training.callback import Callback


class LossSpikeError(ArithmeticError):
    """An update had a spike or a value that is not finite; the module is as it was before that update."""


@attrs.define(field_transformer=checked)
class LossSpikeGuard(Callback):
    """Undoes an update whose loss or gradient norm is not finite, or whose loss is a spike; or stops the run there.

    A spike exceeds the mean of the last `window` good losses by more than `atol` and by more than `rtol` times that
    mean (Lightning's SpikeDetection), once `window` losses are known; `rtol=None` checks for finite values only.
    `action="skip"` restores weights and moments to the bit; the update still counts in `global_step` and in the
    learning rate's schedule. `max_skips` skips in a row raise `LossSpikeError`; `action="stop"` raises it at once.

    Nothing waits for the device: the Trainer has evaluated the metrics of an update before callbacks read them. During
    an update the previous weights and moments are kept: memory for one more copy of what is trained. Put it after
    callbacks that freeze, and before callbacks that read the weights after each update.
    """

    action: str = attrs.field(default="skip", validator=in_(("skip", "stop")))
    window: int = attrs.field(default=10, validator=ge(1), kw_only=True)
    rtol: float | None = attrs.field(default=2.0, validator=optional(ge(0)), kw_only=True)
    atol: float = attrs.field(default=0.0, validator=ge(0), kw_only=True)
    max_skips: int = attrs.field(default=10, validator=ge(1), kw_only=True)
    num_skipped: int = attrs.field(default=0, init=False)
    num_in_a_row: int = attrs.field(default=0, init=False)
    losses: list[float] = attrs.field(factory=list, init=False)  # the last good ones
    _undo = attrs.field(default=None, init=False)

    def on_train_batch_start(self, trainer, module, batches):
        trainer.optimizer.init(
            module.trainable_parameters()
        )  # parameters that were just unfrozen need moments to restore
        # Step counts are not restored: the learning rate's schedule depends on them.
        states = trainer.optimizer.state.get("states", [trainer.optimizer.state])  # of a MultiOptimizer, several
        self._undo = snapshot([module, *(part for state in states for part in state.values())])

    def on_train_batch_end(self, trainer, module, metrics, batches):
        undo, self._undo = self._undo, None
        loss, norm = metrics["loss"].item(), metrics["grad_norm"].item()
        fault = self._fault(loss, norm)
        if fault is None:
            if norm > 0:  # not of batches that all have weight 0
                self.losses = [*self.losses, loss][-self.window :]
            self.num_in_a_row = 0
            return
        undo()
        self.num_skipped, self.num_in_a_row = self.num_skipped + 1, self.num_in_a_row + 1
        trainer.log({"skipped_updates": self.num_skipped})
        if self.action == "stop" or self.num_in_a_row >= self.max_skips:
            raise LossSpikeError(f"update {trainer.global_step}: {fault} ({self._advice()})")

    def _fault(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss:.4g}, the gradient norm {norm:.4g}"
        if self.rtol is None or len(self.losses) < self.window:
            return None
        mean = sum(self.losses) / len(self.losses)
        if loss - mean <= max(self.atol, self.rtol * abs(mean)):
            return None
        return f"the loss is {loss:.4g}, the mean of the last {self.window} is {mean:.4g}"

    def _advice(self) -> str:
        told = "" if self.num_in_a_row < 2 else f"the {self.num_in_a_row}th in a row; "
        return told + "lower the learning rate or gradient_clip_val, look at this batch, or set detect_anomaly=True"

    def on_exception(self, trainer, module, exception):
        self._undo = None

    def state_dict(self):
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row, "losses": self.losses}

    def load_state_dict(self, state):
        self.num_skipped, self.num_in_a_row = state["num_skipped"], state["num_in_a_row"]
        self.losses = list(state["losses"])
