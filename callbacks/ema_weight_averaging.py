"""EMAWeightAveraging: an exponential moving average of the weights, which is validated, tested and saved."""

from collections.abc import Callable
from typing import Any

import attrs
import mlx.core as mx
from attrs.validators import ge, le
from mlx.utils import tree_flatten

from mlxmm.compute.compiled import can_compile
from mlxmm.compute.named_arrays import put_arrays
from mlxmm.config import checked
from mlxmm.errors import UserError
from mlxmm.training.callback import Callback
from mlxmm.training.trace import TraceSnapshot
from mlxmm.training.trainable import trainable_names


@attrs.define(field_transformer=checked)
class EMAWeightAveraging(Callback):
    """`average = decay * average + (1 - decay) * weight`, after each update, for all trainable parameters.

    As Lightning's callback of this name: updates are counted from 0, and every `update_every_n_steps`-th is averaged,
    from `update_starting_at_step` on. A parameter is averaged from the first time it is trainable. Averages are
    float32, so that small steps are not lost in half precision.

    Validation and test use the averages, also those of the same module after an interrupted run; after a run that
    ended normally the module keeps them. They are the weights of a checkpoint, which has the raw weights beside them
    ("raw_weights"), from which a resumed run continues.
    """

    decay: float = attrs.field(default=0.999, validator=[ge(0), le(1)])
    update_every_n_steps: int = attrs.field(default=1, validator=ge(1), kw_only=True)
    update_starting_at_step: int = attrs.field(default=0, validator=ge(0), kw_only=True)
    n_averaged: int = attrs.field(default=0, init=False)  # updates of the averages
    averages: dict[str, mx.array] = attrs.field(factory=dict, init=False)
    _raw: dict[str, mx.array] | None = attrs.field(default=None, init=False)  # set while the module holds the averages
    _stays: bool = attrs.field(default=False, init=False)
    _module: object = attrs.field(default=None, init=False)
    _traced: Any = attrs.field(default=None, init=False)  # the parts that are averaged
    _averaged: Callable | None = attrs.field(default=None, init=False)

    def setup(self, trainer, module, stage):
        if trainer.config.strategy == "fsdp":  # averages of shards would outlive the shards
            raise UserError("EMAWeightAveraging averages whole layers, which strategy fsdp does not have: use ddp")
        if stage == "fit" or module is not self._module:
            self.n_averaged, self.averages, self._raw, self._stays = 0, {}, None, False
        self._module, self._traced = module, TraceSnapshot(module)
        compiles = trainer.config.compile and can_compile()
        self._averaged = mx.compile(self._average) if compiles else self._average

    def on_train_batch_end(self, trainer, module, metrics, batches):
        step = trainer.global_step - 1
        if step < self.update_starting_at_step or step % self.update_every_n_steps:
            return
        self._forget_replaced(module)
        weights, held = dict(tree_flatten(module.parameters())), self.averages
        joining = [name for name in trainable_names(module) if name not in held]
        share = mx.array(1 - self.decay)  # an argument, because a callback may change it
        averages = self._averaged(list(held.values()), [weights[name] for name in held], share)
        self.averages = dict(zip(held, averages)) | {n: weights[n].astype(mx.float32) for n in joining}
        self.n_averaged += 1
        mx.async_eval(self.averages)  # without waiting; otherwise the graph would grow with every update

    def _forget_replaced(self, module) -> None:
        """Of a part that a callback has replaced, the average begins anew."""
        if self._traced.changed():
            replaced, self._traced = self._traced.replaced(module), TraceSnapshot(module)
            self.averages = {name: average for name, average in self.averages.items() if name not in replaced}

    @staticmethod
    def _average(averages: list[mx.array], weights: list[mx.array], share: mx.array) -> list[mx.array]:
        return [average + share * (weight - average) for average, weight in zip(averages, weights)]

    def on_validation_start(self, trainer, module):
        if self._raw is None:
            weights = dict(tree_flatten(module.parameters()))
            self._raw = {name: weights[name] for name in self.averages}
            put_arrays(module, {name: average.astype(self._raw[name].dtype) for name, average in self.averages.items()})

    def on_validation_end(self, trainer, module, metrics):
        self._swap_back(module)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def on_predict_start(self, trainer, module):
        self.on_validation_start(trainer, module)

    def on_predict_end(self, trainer, module):
        self._swap_back(module)

    def on_exception(self, trainer, module, exception):
        self._swap_back(module)

    def on_train_end(self, trainer, module):
        self.on_validation_start(trainer, module)
        self._stays = True  # the last checkpoint still has both

    def _swap_back(self, module) -> None:
        if self._raw is not None and not self._stays:
            put_arrays(module, self._raw)
            self._raw = None

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if self.averages:
            weights = checkpoint["weights"]
            checkpoint["raw_weights"] = self._raw or {name: weights[name] for name in self.averages}
            checkpoint["weights"] = weights | self.averages

    def on_load_checkpoint(self, trainer, module, checkpoint):
        raw = checkpoint.get("raw_weights", {})
        self.averages = {name: checkpoint["weights"][name] for name in raw}
        mx.eval(self.averages)  # `mx.load` is lazy, and the file may be deleted later
        checkpoint["weights"] = checkpoint["weights"] | raw

    def state_dict(self):
        return {"n_averaged": self.n_averaged}

    def load_state_dict(self, state):
        self.n_averaged = state["n_averaged"]
