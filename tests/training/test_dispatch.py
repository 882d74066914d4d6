"""An update that is dispatched while Python goes on is the update that is waited for."""

import mlx.core as mx
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from mlxmm import Callback, Trainer
from mlxmm.training.dispatch import Dispatch


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.seen.append(metrics["loss"])


def run(is_ahead: bool) -> tuple[list[float], dict]:
    losses, module = Losses(), TinyRegression()
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=25, callbacks=[losses], enable_model_summary=False, **settings)
    trainer._dispatch = Dispatch(is_ahead=is_ahead)
    trainer.fit(module, DistinctBatches(), DistinctBatches())
    return [loss.item() for loss in losses.seen], dict(tree_flatten(module.parameters()))


def test_a_run_ahead_of_the_device_ends_as_one_that_waits_to_the_bit():
    (waited, weights), (ahead, others) = run(False), run(True)
    assert len(waited) == 25 and waited == ahead
    assert all(mx.array_equal(array, others[name]) for name, array in weights.items())
