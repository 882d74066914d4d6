"""What mlxmm's sides share: the compiled update of a module, and its inputs. The peers' sides share `torch_side.py`."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxmm import Callback, TrainerConfig
from mlxmm.compute.compiled import Compiler
from mlxmm.compute.cores import cores_for
from mlxmm.training.train_step import TrainStep
from tools.bench.child import clocks, since

WORDS = "red green blue small large round square old new open".split()
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)


class Epochs(Callback):
    """The `seconds` of the newest epoch."""

    def on_train_epoch_start(self, trainer, module):
        self.before = clocks()

    def on_train_epoch_end(self, trainer, module):
        self.seconds = since(self.before)


def updates(module, batch: dict) -> Callable[[], dict]:
    """A turn: the update of `module` as `fit` makes it, from one batch."""
    optimizer = module.config.optimizer.build(1_000)
    optimizer.init(module.trainable_parameters())
    module.train()
    step = TrainStep(module, optimizer, TrainerConfig(), Compiler(True, 8))

    def turn() -> dict:
        with cores_for(module):
            metrics = step(({name: mx.array(array) for name, array in batch.items()},))
            mx.eval(metrics, module.state, optimizer.state)
        return {"check": [metrics["loss"].item()]}

    return turn


def pixels(count: int, side: int) -> np.ndarray:
    """Random pictures (count, side, side, 3), uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
