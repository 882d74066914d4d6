"""What a checkpoint's state.json holds: JSON that anyone reads, and the values that were given, under their names."""

import json
import math
import os
import signal

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback, DataModule, JSONLLogger
from mlxmm.callbacks import ModelCheckpoint
from mlxmm.distributed.signals import Interrupted
from mlxmm.errors import UserError
from mlxmm.storage.json_values import decode, encode
from mlxmm.storage.runs import Run


class Keeps(Callback):
    """Remembers a value across a resume."""

    def __init__(self, value=None):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.fixture
def fit(make_trainer):
    def fit(*callbacks, ckpt_path=None, data=None, **settings):
        keep = ModelCheckpoint(every_n_train_steps=2, monitor="train/loss")
        trainer = make_trainer(callbacks=[*callbacks, keep], log_every_n_steps=1, **{"max_steps": 4} | settings)
        trainer.fit(TinyRegression(), data or DistinctBatches(), ckpt_path=ckpt_path)
        return trainer

    return fit


def strict(path) -> dict:
    def refuse(name):
        raise AssertionError(f"{path} has {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


VALUES = {
    "a NumPy scalar": (np.float32(1.5), 1.5),
    "a NumPy bool": (np.bool_(True), True),
    "an MLX scalar": (mx.array(3), 3),
    "an array without axes": (np.array(2), 2),
    "integer keys": ({0: "a", 1: {2: [3]}}, {0: "a", 1: {2: [3]}}),
    "NumPy keys": ({np.int64(7): 1}, {7: 1}),
    "mixed keys": ({0: "a", "0": "b", None: "c"}, {0: "a", "0": "b", None: "c"}),
    "infinite": ([math.inf, -math.inf], [math.inf, -math.inf]),
    "a tuple": ((1, (2, "x")), [1, [2, "x"]]),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("name", VALUES)
def test_the_state_of_a_callback_comes_back_as_it_was(fit, tmp_path, name):
    value, expected = VALUES[name]
    fit(Keeps(value))
    strict(tmp_path / "checkpoints/last/state.json")
    fit(again := Keeps(), max_steps=5, ckpt_path="last")
    assert again.value == expected and type(again.value) is type(expected)


def test_nan_in_metrics_is_nan_after_a_resume_and_the_files_are_json(fit, tmp_path):
    class Log(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            trainer.log({"ratio": math.nan, "most": math.inf})

    fit(Log(), logger=True)
    state = strict(tmp_path / "checkpoints/last/state.json")
    assert state["callback_metrics"]["ratio"] == {"__float__": "nan"}
    trainer = fit(ckpt_path="last")
    assert math.isnan(trainer.callback_metrics["ratio"]) and trainer.callback_metrics["most"] == math.inf
    run = Run(tmp_path)
    run.report({"test/loss": math.nan, "accuracy": 0.5})
    run.save()
    assert strict(tmp_path / "summary.json") == {"test/loss": None, "accuracy": 0.5}


@pytest.mark.parametrize(
    "value",
    [{1, 2}, mx.ones(3), np.ones(3), object(), {(1, 2): 3}, [{"x": b"bytes"}]],
    ids=lambda value: type(value).__name__,
)
def test_what_json_cannot_hold_is_said_at_the_first_save_with_the_callbacks_name(fit, value):
    steps = []
    note = type("Note", (Callback,), {"on_exception": lambda self, trainer, *args: steps.append(trainer.global_step)})()
    with pytest.raises(UserError, match="^a checkpoint cannot hold callbacks > Keeps > value"):
        fit(note, Keeps(value), max_steps=30)
    assert steps == [2]


def test_what_others_add_is_named_too(fit, tmp_path):
    class Data(DataModule):
        train_dataloader = lambda self: DistinctBatches()
        state_dict = lambda self: {"rows": {1}}

    class Adds(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["state"]["mine"] = {"a": np.float64(2), "b": {3}}

    with pytest.raises(UserError, match="cannot hold datamodule > rows, a set"):
        fit(data=Data())
    with pytest.raises(UserError, match="cannot hold mine > b, a set: give JSON values"):
        fit(Adds(), default_root_dir=tmp_path / "other")


def test_what_is_encoded_is_new_and_comes_back():
    value = {"a": [1, {"b": None}], "c": {1: math.inf}}
    encoded = encode(value)
    assert json.loads(json.dumps(encoded), object_hook=decode) == value
    encoded["a"][1]["b"] = 2
    assert value["a"][1]["b"] is None and encode(encode(value)) == encode(value)


class Terminate(Callback):
    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("error", [ConnectionError("the mail server is down"), SystemExit(7)], ids=repr)
def test_a_callback_that_fails_when_a_run_ends_costs_no_other_its_turn_nor_the_checkpoint_nor_the_exit_code(
    fit, tmp_path, error
):
    heard = []

    class Notify(Callback):
        def on_exception(self, trainer, module, exception):
            raise error

    class Hear(Callback):
        def on_exception(self, trainer, module, exception):
            heard.append(exception.code)

    with (
        pytest.raises(Interrupted) as caught,
        pytest.warns(UserWarning, match=f"Notify.on_exception failed: {error!r:.9}"),
    ):
        fit(Terminate(), Notify(), Hear(), max_steps=9)
    assert caught.value.code == 143 and heard == [143]
    assert strict(tmp_path / "checkpoints/last/state.json")["global_step"] == 3


def test_a_logger_that_fails_when_a_run_ends_does_not_hide_why(fit, tmp_path):
    class Full(JSONLLogger):
        def finalize(self, status):
            raise OSError(28, "No space left on device")

    with pytest.raises(Interrupted), pytest.warns(UserWarning, match="No space left"):
        fit(Terminate(), max_steps=9, logger=Full(tmp_path))


def metrics_of(outputs: dict, module=TinyRegression):
    """A module whose steps return `outputs` too for batches of four rows."""

    class Module(module):
        def training_step(self, batch):
            measured = super().training_step(batch)
            return measured | ({name: make(measured) for name, make in outputs.items()} if len(batch["y"]) > 3 else {})

    return Module()


def mixed() -> list[dict]:
    return [*DistinctBatches(2, 4).batches, *DistinctBatches(1, 3).batches]


@pytest.mark.parametrize("compile", [True, False])
def test_a_metric_that_comes_and_goes_is_named(make_trainer, compile):
    some = {"mae": lambda measured: measured["loss"] * 2}
    with pytest.raises(UserError, match="^a step returned 'mae' for one batch and not for another"):
        make_trainer(compile=compile).validate(metrics_of(some), mixed())
    with pytest.raises(UserError, match="^a step returned 'mae' for one batch and not for another"):
        make_trainer(compile=compile, max_steps=2, accumulate_grad_batches=3).fit(metrics_of(some), mixed())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_number_under_two_names_is_logged_under_both(make_trainer, accumulate):
    twice = {"mse": lambda measured: measured["loss"], "again": lambda measured: measured["loss"] * 1.0}
    settings = {"max_steps": 2, "log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
    trainer = make_trainer(**settings)
    trainer.fit(metrics_of(twice), DistinctBatches(4))
    known = trainer.callback_metrics
    assert known["train/loss"] == known["train/mse"] == known["train/again"]
    alone = make_trainer(**settings)
    alone.fit(TinyRegression(), DistinctBatches(4))
    assert alone.callback_metrics["train/loss"] == known["train/loss"]
