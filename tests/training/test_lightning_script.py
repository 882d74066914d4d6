"""A script written for Lightning: all that is wrong is told at once, and what MLX says of the rest gets a note."""

import importlib.util
import inspect
import sys
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback, Module, Trainer
from mlxmm.callbacks import EarlyStopping, ModelCheckpoint
from mlxmm.errors import UserError

QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}


class Ported(Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = mx.square(self.head(batch["x"].float())).mean()
        self.log("train_loss", loss.item())
        return loss

    def training_epoch_end(self, outputs):
        pass

    def configure_optimizers(self):
        optimizer = optim.Adam(self.parameters(), lr=1e-3)
        return {"optimizer": optimizer}


class Watches(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass

    def on_epoch_end(self, trainer, pl_module):
        pass


class OfTheStep(TinyRegression):
    def training_step(self, batch):
        self.log("train_loss", 0.0)
        loss = super().training_step(batch)["loss"].detach()
        return loss


def refusal(call) -> list[str]:
    """The first words of each line that a call is refused with."""
    with pytest.raises(UserError) as error:
        call()
    first, *rest = str(error.value).split("\n")
    assert first == f"{len(rest)} things to put right:"
    return [line.removeprefix("- ") for line in rest]


def starts(lines: list[str], expected: list[str]) -> bool:
    return len(lines) == len(expected) and all(line.startswith(start) for line, start in zip(lines, expected))


def test_arguments_and_callbacks_of_a_trainer_are_told_together():
    told = refusal(lambda: Trainer(max_epoch=3, gpus=1, max_steps="10", log_every_n_steps=0, callbacks=[Watches(), nn]))
    assert starts(
        told,
        [
            "Trainer has no argument max_epoch: did you mean max_epochs?",
            "Trainer has no argument gpus: leave it out",
            "Trainer(max_steps=...): '10' is not of type int",
            "TrainerConfig: 'log_every_n_steps' must be >= 1",
            "Watches.on_epoch_end is not called here: write on_train_epoch_end",
            "Watches.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx) is called as",
            "module is no callback",
        ],
    )


def test_arguments_of_a_callback_are_told_together():
    told = refusal(lambda: EarlyStopping("val/loss", patince=3, strict=False))
    assert starts(told, ["EarlyStopping has no argument patince", "EarlyStopping has no argument strict"])


def test_methods_source_and_monitors_of_a_fit_are_told_together_before_anything_runs():
    trainer = Trainer(max_steps=2, **QUIET, callbacks=EarlyStopping("val/loss"))
    told = refusal(lambda: trainer.fit(Ported(), [{"x": np.zeros((4, 4), np.float32)}]))
    assert starts(
        told,
        [
            "Ported.training_step(batch, batch_idx) is called as training_step(batch): write that",
            "Ported.training_epoch_end is not called here",
            "an array of MLX has no float: write x.astype(mx.float32)",
            "Ported has no log: return",
            "training_step reads a number out of an array",
            'training_step returned a bare array: return {"loss": loss}',
            "Ported.configure_optimizers: an optimizer of MLX takes no parameters",
            "Ported.configure_optimizers returned a dict: return the optimizer alone",
            "EarlyStopping: 'val/loss' comes from validation, and there is none",
        ],
    )


def test_what_is_found_in_a_step_comes_with_the_other_words_of_the_source(make_trainer):
    told = refusal(lambda: make_trainer(max_steps=1).fit(OfTheStep(), DistinctBatches(2)))
    assert starts(
        told, ["OfTheStep has no log: return", "an array of MLX has no detach", "training_step returned a bare"]
    )


class Reads(TinyRegression):
    """Valid: its property needs a device of its own, and `loss` is what a function within its step returns."""

    @property
    def device(self):
        raise RuntimeError("only on a machine with a device")

    def where(self):
        return self.device

    def training_step(self, batch):
        def total():
            loss = super(Reads, self).training_step(batch)["loss"]
            return loss

        return {"loss": total()}


class Misspelt(Reads):
    def training_stop(self, batch):
        pass

    def configure_optimizers(self):
        print("""a text that is
not indented""")
        return optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_the_source_of_a_valid_module_is_not_read_and_properties_are_never_run(make_trainer, monkeypatch):
    read, getsource = [], inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda method: read.append(method) or getsource(method))
    make_trainer(max_steps=1).fit(Reads(), DistinctBatches(2))
    assert not read
    told = refusal(lambda: make_trainer(max_steps=1).fit(Misspelt(), DistinctBatches(2)))
    assert read and starts(
        told, ["Misspelt.training_stop is not called here", "Misspelt.configure_optimizers: an optimizer of MLX takes"]
    )


def test_arguments_that_change_nothing_are_taken_by_classes_that_derive_from_those_of_mlxmm(tmp_path, monkeypatch):
    class Own(ModelCheckpoint):
        pass

    assert isinstance(Own(save_last=True), Own)
    (tmp_path / "mine.py").write_text("import mlxmm\nclass Theirs(mlxmm.Callback):\n    def __init__(self): ...\n")
    spec = importlib.util.spec_from_file_location("callbacks.mine", tmp_path / "mine.py")
    monkeypatch.setitem(sys.modules, "callbacks.mine", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match="^Theirs has no argument verbose"):
        module.Theirs(verbose=True)


class Says(Module):
    """`body(module, batch)` in the place of a loss."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.table, self.head, self.body = nn.Conv2d(3, 2, 3), nn.Embedding(4, 2), nn.Linear(4, 3), body

    def training_step(self, batch):
        return {"loss": self.body(self, batch).mean()}

    def configure_optimizers(self):
        return optim.SGD(0.1)


BATCH = {
    "nchw": np.zeros((2, 3, 8, 8), np.float32),
    "bytes": np.zeros((2, 8, 8, 3), np.uint8),
    "rows": np.zeros((2, 4), np.float32),
    "classes": np.zeros(2, np.float32),
}
NOTES = {
    "pictures are (N, H, W, C), this looks like (N, C, H, W)": (ValueError, lambda m, b: m.conv(b["nchw"])),
    "pixels are floats, these are uint8": (ValueError, lambda m, b: m.conv(b["bytes"])),
    "MLX has axis= in place of dim=, keepdims= in place of keepdim=": (
        TypeError,
        lambda m, b: b["rows"].mean(dim=1, keepdim=True),
    ),
    "MLX has input_dims= in place of in_features=": (TypeError, lambda m, b: nn.Linear(in_features=4, output_dims=1)),
    "labels and ids are integers": (
        RuntimeError,
        lambda m, b: nn.losses.cross_entropy(m.head(b["rows"]), b["classes"]),
    ),
    "labels and ids are integers: x": (ValueError, lambda m, b: m.table(b["classes"])),
    "write dict(mlx.utils.tree_flatten(part.parameters()))": (AttributeError, lambda m, b: m.head.state_dict()),
}


@pytest.mark.parametrize("note", NOTES)
def test_an_error_of_mlx_stays_as_it_is_and_gets_a_note(make_trainer, note):
    kind, body = NOTES[note]
    with pytest.raises(kind) as error:
        make_trainer(max_steps=1).fit(Says(body), [BATCH])
    [told] = error.value.__notes__
    assert type(error.value) is kind and told.startswith(f"mlxmm: {note}")


def test_an_error_of_the_users_own_gets_no_note(make_trainer):
    def raises(module, batch):
        raise TypeError("mean(): kwargs of my own, dim")

    with pytest.raises(TypeError) as error:
        make_trainer(max_steps=1).fit(Says(raises), [BATCH])
    assert not hasattr(error.value, "__notes__")


def test_warnings_point_to_the_line_of_the_user(make_trainer):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            trainer.should_stop = True

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_steps=3, min_steps=3, callbacks=[Stops()]).fit(TinyRegression(), DistinctBatches(4))
        Trainer(precision="16-mixed", **QUIET)
    assert len(caught) == 2 and {warning.filename for warning in caught} == {__file__}


def test_a_divergence_is_said_with_the_loss_it_is_compared_with(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.log("train/loss", 2.0)
    with pytest.warns(UserWarning, match=r"^train/loss is 100 after 7 updates: training diverges \(it was 2 after 0\)"):
        trainer.progress.global_step = 7
        trainer.log("train/loss", 100.0)


def test_a_metric_in_lightnings_spelling_is_answered_with_ours(make_trainer):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(TinyRegression(), DistinctBatches(2), DistinctBatches(1))
    with pytest.raises(KeyError, match=r"^metrics\['val_loss'\]: did you mean val/loss\?$"):
        trainer.callback_metrics["val_loss"]


def test_a_run_that_ends_before_it_measures_anything_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    class Fails(TinyRegression):
        def on_train_batch_end(self, metrics, batches):
            raise RuntimeError("own")

    run = lambda module, **settings: Trainer(max_steps=3, **QUIET | {"logger": True, "enable_checkpointing": True}).fit(
        module, DistinctBatches(4), **settings
    )
    run(TinyRegression())
    with pytest.raises(RuntimeError, match="own"):
        run(Fails())
    assert [str(path) for path in tmp_path.glob("runs/*/*")] == [str(tmp_path / "runs/TinyRegression/version_0")]
    (tmp_path / "runs/TinyRegression/version_7/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="version_7/checkpoints; an earlier run has .*version_0/checkpoints/last$"):
        run(TinyRegression(), ckpt_path="last")
    (tmp_path / "runs/TinyRegression/version_7/checkpoints").rmdir()
    run(TinyRegression(), ckpt_path="last")
    assert "resuming from runs/TinyRegression/version_0/checkpoints/step=3" in capsys.readouterr().out
