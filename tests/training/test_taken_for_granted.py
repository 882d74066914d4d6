"""What a Lightning user takes for granted: means over examples, the data of the last fit, values in a checkpoint."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxmm import Callback, DataModule, Module, Trainer
from mlxmm.errors import UserError

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
X = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
BATCHES = [{"x": X[:4], "y": X[:4, 0]}, {"x": X[4:8], "y": X[4:8, 0]}, {"x": X[8:], "y": X[8:, 0]}]


class Line(Module):
    """Squared errors of a line; its step returns no "weight"."""

    def __init__(self):
        super().__init__()
        mx.random.seed(3)
        self.layer, self.outputs = nn.Linear(3, 1), []

    def training_step(self, batch):
        return {"loss": mx.square(self.layer(batch["x"])[:, 0] - batch["y"]).mean()}

    def configure_optimizers(self):
        return optim.SGD(0.1)


class Data(DataModule):
    def train_dataloader(self):
        return BATCHES

    def val_dataloader(self):
        return BATCHES[1:]

    def test_dataloader(self):
        return BATCHES[2:]


def errors_of(module, x) -> float:
    return float(mx.square(module.layer(mx.array(x))[:, 0] - mx.array(x[:, 0])).mean())


def test_a_batch_without_a_weight_counts_by_its_examples():
    module = Line()
    assert Trainer(**QUIET).test(module, BATCHES)["test/loss"] == pytest.approx(errors_of(module, X), rel=1e-6)


def test_micro_batches_without_a_weight_make_the_update_of_one_large_batch():
    whole, parts = Line(), Line()
    Trainer(max_steps=1, **QUIET).fit(whole, [{"x": X, "y": X[:, 0]}])
    Trainer(max_steps=1, accumulate_grad_batches=3, **QUIET).fit(parts, BATCHES)
    np.testing.assert_allclose(np.array(parts.layer.weight), np.array(whole.layer.weight), rtol=1e-5)


def test_a_stage_without_data_is_of_those_of_the_fit():
    module, trainer = Line(), Trainer(max_steps=1, **QUIET)
    trainer.fit(module, datamodule=Data())
    assert trainer.test()["test/loss"] == pytest.approx(errors_of(module, X[8:]), rel=1e-5)
    assert trainer.validate(module)["val/loss"] == pytest.approx(errors_of(module, X[4:]), rel=1e-5)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stage_that_has_no_data_says_so(stage):
    trainer = Trainer(max_steps=1, **QUIET)
    with pytest.raises(UserError, match="there are no (val|test|predict) data: give dataloaders, or a datamodule with"):
        getattr(trainer, stage)(Line())
    trainer.fit(Line(), BATCHES)
    with pytest.raises(UserError, match="there are no"):
        getattr(trainer, stage)()


@pytest.mark.parametrize("value", [1, 0.5, {"a": 1.0}, [1, 2]], ids=str)
def test_a_value_beside_the_state_of_a_checkpoint_is_named(value, tmp_path):
    class Mine(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["mine"] = value

    trainer = Trainer(max_steps=1, callbacks=[Mine()], **QUIET)
    trainer.fit(Line(), BATCHES)
    with pytest.raises(
        UserError, match=r"checkpoint\['mine'\] is no dict of arrays: write checkpoint\['state'\]\['mine'\]"
    ):
        trainer.save_checkpoint(tmp_path / "checkpoint")


class Appending(Line):
    def training_step(self, batch):
        outputs = super().training_step(batch)
        self.outputs.append(outputs["loss"])
        return outputs


class Setting(Line):
    def training_step(self, batch):
        outputs = super().training_step(batch)
        self.newest = outputs["loss"]
        return outputs


class AppendingInValidation(Line):
    def validation_step(self, batch):
        outputs = self.training_step(batch)
        self.outputs.append(outputs["loss"])
        return outputs


@pytest.mark.parametrize("kind", [Appending, Setting, AppendingInValidation], ids=lambda kind: kind.__name__)
def test_a_step_that_adds_arrays_to_its_module_is_named_and_harms_no_later_run(kind):
    module = kind()
    with pytest.raises(UserError, match=r"changes which arrays its module has \((outputs.0|newest)\)"):
        Trainer(max_steps=2, **QUIET).fit(module, BATCHES, BATCHES)
    assert module.outputs == [] and "newest" not in module
    trainer = Trainer(max_steps=2, **QUIET)
    trainer.fit(Line(), BATCHES, BATCHES)
    assert np.isfinite(trainer.callback_metrics["val/loss"])


def test_the_means_of_a_validation_are_there_at_the_end_of_its_epoch():
    seen = []

    class Watch(Callback):
        def on_validation_epoch_end(self, trainer, module):
            seen.append(trainer.callback_metrics["val/loss"])

        def on_validation_end(self, trainer, module, metrics):
            seen.append(metrics["val/loss"])

    Trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[Watch()], **QUIET).fit(Line(), BATCHES, BATCHES)
    assert len(seen) == 4 and seen[0] == seen[1] != seen[2] == seen[3]


def test_a_stage_asks_for_its_loader_once():
    asked = []

    class Asked(Data):
        def val_dataloader(self):
            asked.append("val")
            return BATCHES

    Trainer(max_epochs=1, **QUIET).validate(Line(), datamodule=Asked())
    assert asked == ["val"]
