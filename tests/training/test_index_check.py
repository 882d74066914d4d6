"""Labels and ids that index nothing are refused before MLX reads or writes foreign memory; nothing else is changed."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxmm import Module
from mlxmm.errors import UserError
from mlxmm.losses import token_loss
from mlxmm.training.index_check import IndexCheck


class Labels(Module):
    """Three classes, and an embedding of three rows."""

    def __init__(self, loss):
        super().__init__()
        self.head, self.table, self.norm, self.loss = nn.Linear(4, 3), nn.Embedding(3, 4), nn.BatchNorm(4), loss
        self.num_calls, self.drop = 0, nn.Dropout(0.5)

    def training_step(self, batch):
        self.num_calls += 1
        x = self.drop(self.norm(batch["x"]))
        return {"loss": self.loss(self, x, batch["y"]).mean()}

    def predict_step(self, batch):
        return self.head(batch["x"])

    def configure_optimizers(self):
        return optim.SGD(0.1)


LOSSES = {
    "labels for 3 classes": lambda self, x, y: nn.losses.cross_entropy(self.head(x), y),
    "the ids for table": lambda self, x, y: self.head(self.table(y)),
    "the indices of take": lambda self, x, y: mx.take(self.head.bias, y),
    "labels for 3 classes, in a loss of ours": lambda self, x, y: token_loss(self.head(x), y, mx.ones(8)),
}


def batch(*labels: int) -> dict:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    return {"x": x, "y": np.resize(labels, 8).astype(np.int32)}


def fit(make_trainer, loss, *batches, val=None, **settings):
    mx.random.seed(0)
    module = Labels(loss)
    trainer = make_trainer(max_epochs=1, **settings)
    trainer.fit(module, list(batches), val)
    return module


@pytest.mark.parametrize("what", LOSSES)
@pytest.mark.parametrize("compiled", [True, False])
def test_an_index_out_of_range_in_the_first_batch_is_refused(make_trainer, what, compiled):
    with pytest.raises(UserError, match=f"^training_step: {what.partition(',')[0]} are 0 to 3, and must be 0 to 2$"):
        fit(make_trainer, LOSSES[what], batch(0, 1, 3), compile=compiled)


def test_labels_are_checked_in_every_batch_and_stage(make_trainer):
    loss = LOSSES["labels for 3 classes"]
    with pytest.raises(UserError, match="^training_step: labels for 3 classes are 0 to 3, and must be 0 to 2$"):
        fit(make_trainer, loss, batch(0, 1), batch(2, 1), batch(0, 3))
    with pytest.raises(UserError, match="^validation_step: labels for 3 classes are 1 to 3, and must be 0 to 2$"):
        fit(make_trainer, loss, batch(0, 1), val=[batch(0, 1), batch(0, 2), batch(1, 3)])


def test_what_is_not_within_the_table_at_all_is_refused_and_what_counts_from_its_end_is_said(make_trainer):
    loss = LOSSES["labels for 3 classes"]
    with pytest.raises(UserError, match="are -100 to 2, and must be 0 to 2: give examples to be ignored"):
        fit(make_trainer, loss, batch(0, 2, -100))
    with pytest.warns(
        UserWarning, match="are -1 to 2, and must be 0 to 2: MLX counts negative ones from the end"
    ) as told:
        fit(make_trainer, loss, batch(0, 2, -1), batch(0, -1))
    assert told[0].filename == __file__ and len(told) == 1


def test_the_check_runs_no_step_of_its_own(make_trainer):
    """What Lightning's users write, `self.outs.append(…)`, has an entry for each batch."""
    module = fit(make_trainer, LOSSES["the indices of take"], batch(0, 2), batch(1, 1), compile=False)
    assert module.num_calls == 2


def test_no_other_thread_is_checked():
    module = Labels(None)
    check, ids, own = IndexCheck(module, module.training_step), {"y": mx.array([5])}, mx.take
    check.check(ids)
    with check.noted(ids):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(mx.take, mx.zeros(3), ids["y"]).result()
        with pytest.raises(UserError, match="the indices of take are 5 to 5"):
            mx.take(mx.zeros(3), ids["y"])
    assert mx.take is own


def test_an_array_that_indexes_two_tables_is_held_against_the_smaller_one(make_trainer):
    def loss(self, x, y):
        return mx.take(mx.zeros(9), y) + nn.losses.cross_entropy(self.head(x), y) + mx.take(mx.zeros(9), y)

    with pytest.raises(UserError, match="labels for 3 classes are 0 to 5"):
        fit(make_trainer, loss, batch(0, 1), batch(0, 5))


def test_ids_of_which_there_are_none_are_not_out_of_range(make_trainer):
    def loss(self, x, y):
        return mx.take(self.head.bias, y).sum() + self.head(x).sum()

    fit(make_trainer, loss, batch(0, 1), batch(0, 1) | {"y": np.zeros(0, np.int32)}, compile=False)


def test_a_batch_is_checked_in_an_update_of_several(make_trainer):
    with pytest.raises(UserError, match="labels for 3 classes are 0 to 3"):
        batches = [batch(0, 1), batch(0, 3)]
        fit(make_trainer, LOSSES["labels for 3 classes"], *batches, accumulate_grad_batches=2)
