"""Labels and ids that index nothing are refused before MLX reads or writes foreign memory; nothing else is changed."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxmm import Module
from mlxmm.errors import UserError
from mlxmm.losses import linear_token_loss, token_loss


class Labels(Module):
    """Three classes; an embedding of four rows, whose ids are made in the step."""

    def __init__(self, loss):
        super().__init__()
        self.head, self.table, self.norm, self.loss = nn.Linear(4, 3), nn.Embedding(4, 4), nn.BatchNorm(4), loss
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
    "the ids for table": lambda self, x, y: self.head(self.table(y + 1)),
    "the indices of take": lambda self, x, y: mx.take(self.head.bias, y),
    "the indices of take_along_axis": lambda self, x, y: mx.take_along_axis(self.head(x), y[:, None], axis=-1),
}
OURS = {
    "token_loss": lambda self, x, y: token_loss(self.head(x)[None], y[None], mx.ones((1, 8))),
    "linear_token_loss": lambda self, x, y: linear_token_loss(x, self.head.weight, y, mx.ones(8))[0],
}


def batch(*labels: int) -> dict:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    return {"x": x, "y": np.resize(labels, 8).astype(np.int32)}


def fit(make_trainer, loss, *batches, val=None, **settings):
    module = Labels(loss)
    trainer = make_trainer(max_epochs=1, **settings)
    trainer.fit(module, list(batches), val)
    return module


@pytest.mark.parametrize("what", LOSSES)
@pytest.mark.parametrize("compiled", [True, False])
def test_an_index_out_of_range_in_the_first_batch_is_refused(make_trainer, what, compiled):
    with pytest.raises(UserError, match=f"^training_step: {what} are .* and must be 0 to [23]$"):
        fit(make_trainer, LOSSES[what], batch(0, 1, 3), compile=compiled)


@pytest.mark.parametrize("name", OURS)
def test_our_own_losses_are_checked(make_trainer, name):
    with pytest.raises(UserError, match="^training_step: .* are 0 to 3, and must be 0 to 2$"):
        fit(make_trainer, OURS[name], batch(0, 1, 3))


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


def test_the_check_leaves_module_and_random_numbers_as_they_were(make_trainer, monkeypatch):
    loss = LOSSES["labels for 3 classes"]
    checked = fit(make_trainer, loss, batch(0, 2), batch(1, 1))
    monkeypatch.setattr("mlxmm.training.index_check.IndexCheck.__call__", lambda *args: None)
    plain = fit(make_trainer, loss, batch(0, 2), batch(1, 1))
    assert checked.num_calls == plain.num_calls
    for one, other in zip(checked.head.values(), plain.head.values()):
        assert mx.array_equal(one, other)
    assert mx.array_equal(checked.norm.running_mean, plain.norm.running_mean)
