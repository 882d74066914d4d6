"""A run with everything on, resumed at each of its updates, is the run that was never stopped, to the bit."""

import os
import signal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from callbacks import (
    EMAWeightAveraging,
    FreezeSchedule,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    LossSpikeGuard,
    ModelCheckpoint,
)
from mlxmm import Callback, Module
from mlxmm.compute.deterministic import repeats_to_the_bit
from mlxmm.distributed.signals import Interrupted
from mlxmm.optimizers import AdamW, grouped, warmup_cosine
from mlxmm.storage import checkpoint

NUM_STEPS = 17  # 4 epochs of 7 batches: 7, then 4, 4 and 2 of an epoch that is not complete


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm(4)

    def __call__(self, x):
        return mx.tanh(self.norm(self.linear(x)))


class Everything(Module):
    """BatchNorm, dropout, arrays in a list, an integer buffer, one part under two names, and two rates."""

    def __init__(self):
        super().__init__()
        mx.random.seed(2)
        self.layers, self.dropout, self.head = [Block(), Block()], nn.Dropout(0.2), nn.Linear(4, 1)
        self.gains, self.order, self.again = [mx.ones(4), mx.ones(4)], mx.array([3, 1, 0, 2]), self.head

    def training_step(self, batch):
        hidden = mx.take(batch["x"], self.order, axis=1)
        for layer, gain in zip(self.layers, self.gains):
            hidden = self.dropout(layer(hidden)) * gain
        errors = mx.square(self.again(hidden)[:, 0] - batch["y"]) * batch["mask"]
        return {"loss": errors.sum() / batch["mask"].sum(), "weight": batch["mask"].sum()}

    def configure_optimizers(self):
        return grouped(AdamW(warmup_cosine(0.05, 2, NUM_STEPS)), head=AdamW(0.01))


class Shuffled:
    """Seven batches in an order, and with noise, from NumPy's global generator; one is nan, one weighs 0."""

    has_nan = True

    def __len__(self):
        return 7

    def __iter__(self):
        for i in np.random.permutation(7):
            rng = np.random.default_rng(int(i))
            x = rng.normal(size=(4, 4)) + 0.01 * np.random.normal()
            mask = np.full(4, float(i != 3))
            yield {"x": x * (np.nan if i == 5 and self.has_nan else 1), "y": rng.normal(size=4), "mask": mask}


class Held(Shuffled):
    has_nan = False


class BestTwo(ModelCheckpoint):
    """A second one, whose state has a name of its own."""


class KillAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def parts(folder):
    schedule = FreezeSchedule({0: "head", 3: ("layers", "gains", "head"), 8: ("layers[:1]", "head")}, unit="step")
    every = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, monitor="train/loss", save_top_k=-1)
    best = BestTwo(dirpath=folder / "best_two", monitor="val/loss", save_top_k=2)
    guard, average = LossSpikeGuard(window=4, rtol=1.5), EMAWeightAveraging(0.8)
    return [schedule, GradientAccumulationScheduler({1: 2}), guard, average, LearningRateMonitor(), every, best]


def fit(make_trainer, folder, ckpt_path=None, callbacks=(), **settings):
    trainer = make_trainer(
        callbacks=[*callbacks, *parts(folder)],
        max_steps=NUM_STEPS,
        val_check_interval=0.5,
        log_every_n_steps=1,
        deterministic=not repeats_to_the_bit(mx.default_device(), deterministic=False),
        **settings,
    )
    trainer.fit(Everything(), train_dataloaders=Shuffled(), val_dataloaders=Held(), ckpt_path=ckpt_path)


def contents(folder) -> dict:
    """All that a checkpoint holds, but the seconds it took and the folder it is in."""
    saved = checkpoint.load(folder)
    arrays = {f"{file}.{n}": np.array(a) for file in saved if file != "state" for n, a in saved[file].items()}
    state = {key: saved["state"][key] for key in ("global_step", "current_epoch", "batch_idx", "trainable")}
    state |= {"metrics": saved["state"]["callback_metrics"], "guard": saved["state"]["callbacks"]["LossSpikeGuard"]}
    scores = [held["scores"] for key, held in saved["state"]["callbacks"].items() if "scores" in held]
    return arrays | state | {"scores": scores}


def assert_resumed_runs_end_as_the_whole(make_trainer, tmp_path, places, **settings):
    whole, last = tmp_path / "whole", f"step={NUM_STEPS}"
    fit(make_trainer, whole, **settings)
    expected = contents(whole / last)
    assert expected["guard"]["num_skipped"] >= 2
    assert all(np.isfinite(value).all() for value in expected.values() if isinstance(value, np.ndarray))
    for place in places:
        folder = tmp_path / str(place)
        with pytest.raises(Interrupted):
            fit(make_trainer, folder, callbacks=[KillAt(place)], **settings)
        fit(make_trainer, folder, folder / "last", **settings)
        resumed = contents(folder / last)
        assert resumed.keys() == expected.keys()
        different = [name for name in expected if not is_same(expected[name], resumed[name])]
        assert not different, f"resumed at {place}"
        names = [{path.name for path in (run / "best_two").iterdir()} for run in (folder, whole)]
        assert names[0] >= names[1]  # the one that was saved when it was stopped stays


def is_same(left, right) -> bool:
    return np.array_equal(left, right) if isinstance(left, np.ndarray) else repr(left) == repr(right)  # nan is nan


def test_a_run_with_everything_on_is_the_same_to_the_bit_after_a_resume(make_trainer, tmp_path):
    assert_resumed_runs_end_as_the_whole(make_trainer, tmp_path, [6, 13], compile=False)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"precision": "bf16-mixed"}], ids=str)
def test_it_is_the_same_wherever_it_was_stopped(make_trainer, tmp_path, settings):
    assert_resumed_runs_end_as_the_whole(make_trainer, tmp_path, range(1, NUM_STEPS), **settings)


def test_frozen_statistics_stay_while_those_of_trained_layers_move(make_trainer, tmp_path):
    module = Everything()
    before = dict(tree_flatten(module.parameters()))
    make_trainer(max_steps=3, callbacks=[FreezeSchedule({0: ("layers[:1]", "head")})], compile=False).fit(
        module, train_dataloaders=[{"x": np.ones((2, 4)) * [[1], [2]], "y": np.ones(2), "mask": np.ones(2)}] * 3
    )
    moved = {name for name, array in tree_flatten(module.parameters()) if not mx.array_equal(array, before[name])}
    assert "layers.0.norm.running_mean" in moved
    assert not {name for name in moved if name.startswith(("layers.1", "gains", "order"))}
