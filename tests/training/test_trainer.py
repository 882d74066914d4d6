"""The Trainer's promises, on real training of a tiny module with dropout and distinct shuffled batches."""

import json
import math
import os
import signal
import traceback
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

import mlxmm
from callbacks import FreezeSchedule, LearningRateMonitor, ModelCheckpoint
from mlxmm import Callback, JSONLLogger
from mlxmm.distributed.signals import Interrupted
from mlxmm.errors import UserError
from mlxmm.optimizers import AdamW, OptimizerConfig, grouped
from mlxmm.training.randomness import step_seed
from mlxmm.training.trainable import set_trainable


def weights(module) -> dict:
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def assert_same(left: dict, right: dict, atol: float = 0.0):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("stop_at", [1, 5, 6, 8])
def test_a_resumed_run_is_the_run_that_was_never_stopped(make_trainer, tmp_path, stop_at):
    whole, data = TinyRegression(), DistinctBatches()
    make_trainer(max_steps=14).fit(whole, train_dataloaders=data, val_dataloaders=data)

    save = ModelCheckpoint(every_n_train_steps=stop_at, dirpath=tmp_path / "checkpoints")
    make_trainer(max_steps=stop_at, callbacks=[save]).fit(TinyRegression(), train_dataloaders=data)
    resumed = TinyRegression()
    make_trainer(max_steps=14).fit(
        resumed, train_dataloaders=data, val_dataloaders=data, ckpt_path=tmp_path / "checkpoints" / "last"
    )
    assert_same(weights(whole), weights(resumed))


def test_compiled_training_equals_plain_python(make_trainer):
    modules = [TinyRegression(), TinyRegression()]
    for module, compiled in zip(modules, (True, False)):
        make_trainer(max_steps=8, compile=compiled).fit(module, train_dataloaders=DistinctBatches())
    assert_same(*map(weights, modules), atol=1e-6)


@pytest.mark.parametrize("num_batches", [2, 4])
def test_accumulating_equals_one_large_batch(make_trainer, num_batches):
    large = DistinctBatches(num_batches=1, batch_size=8).batches[0]
    small = [{name: array[i::num_batches] for name, array in large.items()} for i in range(num_batches)]
    one, many = TinyRegression(dropout=0.0), TinyRegression(dropout=0.0)
    make_trainer(max_steps=3).fit(one, train_dataloaders=[large])
    make_trainer(max_steps=3, accumulate_grad_batches=num_batches).fit(many, train_dataloaders=small)
    assert_same(weights(one), weights(many), atol=1e-6)


def test_global_step_counts_updates_and_the_last_window_is_stepped(make_trainer):
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=4)
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(num_batches=6))
    assert (trainer.global_step, trainer.current_epoch) == (4, 2)


def test_a_frozen_layer_stops_moving_under_the_compiled_step_and_moves_again(make_trainer):
    seen = []

    class Watchdog(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            if trainer.global_step == 3:
                module.backbone.freeze()
            if trainer.global_step == 6:
                module.backbone.unfreeze()

        def on_train_batch_end(self, trainer, module, metrics, batches):
            seen.append(np.array(module.backbone.weight))

    make_trainer(max_steps=9, callbacks=[Watchdog()]).fit(TinyRegression(), train_dataloaders=DistinctBatches())
    moved = [not np.array_equal(a, b) for a, b in zip(seen, seen[1:])]
    assert moved == [True, True, False, False, False, True, True, True]


def test_freeze_schedule_opens_exactly_what_it_names_and_survives_resume(make_trainer, tmp_path):
    def schedule():
        return FreezeSchedule({0: "head", 1: ("head", "backbone.weight")})

    start, data = weights(TinyRegression()), DistinctBatches()
    whole = TinyRegression()
    make_trainer(max_epochs=3, callbacks=[schedule()]).fit(whole, train_dataloaders=data)
    changed = {name for name, array in weights(whole).items() if not np.array_equal(array, start[name])}
    assert changed == {"head.weight", "head.bias", "backbone.weight"}

    save = ModelCheckpoint(every_n_train_steps=8, dirpath=tmp_path / "c")
    make_trainer(max_steps=8, callbacks=[schedule(), save]).fit(TinyRegression(), train_dataloaders=data)
    resumed = TinyRegression()
    trainer = make_trainer(max_epochs=3, callbacks=[schedule()])
    trainer.fit(resumed, train_dataloaders=data, ckpt_path=tmp_path / "c" / "last")
    assert_same(weights(whole), weights(resumed))


def test_a_change_of_what_is_trainable_keeps_moments_and_gives_new_ones_their_own(make_trainer):
    kept = []

    class Open(Callback):
        def setup(self, trainer, module, stage):
            set_trainable(module, ["head.weight"])

        def on_train_batch_start(self, trainer, module, batches):
            if trainer.global_step == 3:
                kept.append(np.array(trainer.optimizer.state["head"]["weight"]["m"]))
                assert not trainer.optimizer.state.get("backbone")
                set_trainable(module, ["head.weight", "backbone.weight"])
                trainer._build_train_step()
                kept.append(np.array(trainer.optimizer.state["head"]["weight"]["m"]))

    trainer = make_trainer(max_steps=4, callbacks=[Open()])
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
    np.testing.assert_array_equal(*kept)
    state = trainer.optimizer.state["backbone"]["weight"]
    assert int(state["start"]) == 3 and float(mx.abs(state["m"]).max()) > 0


def test_a_parameter_opened_late_starts_as_one_opened_first():
    late, early = AdamW(0.1, weight_decay=0.0), AdamW(0.1, weight_decay=0.0)
    late.init({"a": mx.zeros(3)})
    for _ in range(50):
        late.apply_gradients({"a": mx.ones(3)}, {"a": mx.zeros(3)})
    late.init({"a": mx.zeros(3), "b": mx.zeros(3)})
    early.init({"b": mx.zeros(3)})
    moved_late = late.apply_gradients({"b": mx.ones(3)}, {"b": mx.zeros(3)})["b"]
    moved_early = early.apply_gradients({"b": mx.ones(3)}, {"b": mx.zeros(3)})["b"]
    np.testing.assert_allclose(np.array(moved_late), np.array(moved_early), rtol=1e-5)


class TwoRates(TinyRegression):
    def configure_optimizers(self):
        slow, fast = (OptimizerConfig(learning_rate=rate, warmup_steps=0).build(9) for rate in (1e-4, 1e-2))
        return grouped(slow, head=fast)


def test_parts_of_a_module_have_learning_rates_of_their_own(make_trainer):
    module = TwoRates()
    before = weights(module)
    make_trainer(max_steps=1).fit(module, train_dataloaders=DistinctBatches())
    moved = {name: np.abs(array - before[name]).max() for name, array in weights(module).items()}
    # Adam's first step is its rate, up to eps and decay.
    assert moved["head.weight"] == pytest.approx(1e-2, rel=0.1)
    assert moved["backbone.weight"] == pytest.approx(1e-4, rel=0.1)


def test_a_run_with_two_rates_and_a_schedule_of_freezing_resumes_to_the_bit(make_trainer, tmp_path):
    def fit(max_steps, ckpt_path=None):
        trainer, module = (
            make_trainer(max_steps=max_steps, callbacks=[FreezeSchedule({0: "head", 1: ("head", "backbone")})]),
            TwoRates(),
        )
        trainer.fit(module, train_dataloaders=DistinctBatches(), ckpt_path=ckpt_path)
        return trainer, module

    _, whole = fit(9)
    for stop in (3, 6, 8):
        fit(stop)[0].save_checkpoint(tmp_path / str(stop))
        assert_same(weights(whole), weights(fit(9, tmp_path / str(stop))[1]))


def test_gains_and_biases_do_not_decay():
    optimizer = AdamW(0.1, weight_decay=0.5)
    parameters = {"gain": mx.ones(3), "matrix": mx.ones((3, 3))}
    moved = optimizer.apply_gradients({k: mx.zeros_like(v) for k, v in parameters.items()}, parameters)
    assert mx.array_equal(moved["gain"], parameters["gain"]) and float(moved["matrix"].max()) < 1


def test_a_callback_sees_real_gradients_and_changes_nothing(make_trainer):
    norms = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, module, grads):
            norms.append(math.sqrt(sum(float(mx.square(g).sum()) for _, g in tree_flatten(grads))))

        def on_train_batch_end(self, trainer, module, metrics, batches):
            norms[-1] = (norms[-1], float(metrics["grad_norm"]))

    watched, alone = TinyRegression(), TinyRegression()
    make_trainer(max_steps=5, callbacks=[Look()]).fit(watched, train_dataloaders=DistinctBatches())
    make_trainer(max_steps=5).fit(alone, train_dataloaders=DistinctBatches())
    assert all(seen == pytest.approx(told, rel=1e-5) for seen, told in norms) and len(norms) == 5
    assert_same(weights(watched), weights(alone), atol=1e-6)


def test_validation_counts_examples_not_batches_and_leaves_training_alone(make_trainer):
    data = DistinctBatches()
    ragged = [data.batches[0], {name: array[:1] for name, array in data.batches[1].items()}]
    module = TinyRegression()
    trainer = make_trainer()
    told = trainer.validate(module, dataloaders=ragged)["val/loss"]
    joined = {name: np.concatenate([batch[name] for batch in ragged]) for name in ragged[0]}
    assert told == pytest.approx(trainer.validate(module, dataloaders=[joined])["val/loss"], rel=1e-5)
    assert module.dropout.training

    often, never = TinyRegression(), TinyRegression()
    make_trainer(max_steps=8, val_check_interval=2).fit(often, train_dataloaders=data, val_dataloaders=ragged)
    make_trainer(max_steps=8).fit(never, train_dataloaders=data)
    assert_same(weights(often), weights(never))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint(make_trainer, tmp_path, number):
    class Kill(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            if trainer.global_step == 4:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    trainer = make_trainer(max_steps=20, callbacks=[Kill(), ModelCheckpoint()])
    with pytest.raises(Interrupted) as caught:
        trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
    assert caught.value.code == 128 + number and trainer.global_step == 5
    assert json.loads((tmp_path / "checkpoints/last/state.json").read_text())["global_step"] == 5
    assert signal.getsignal(number) is before


def test_metrics_of_a_resumed_run_are_those_of_the_whole_one(make_trainer, tmp_path):
    class Die(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            if trainer.global_step == 10:
                raise RuntimeError("two updates after a checkpoint")

    def fit(folder, *others, ckpt_path=None):
        save = ModelCheckpoint(every_n_train_steps=4, dirpath=folder / "c")
        trainer = make_trainer(max_steps=15, log_every_n_steps=1, logger=JSONLLogger(folder), callbacks=[*others, save])
        trainer.fit(
            TinyRegression(),
            train_dataloaders=DistinctBatches(),
            val_dataloaders=DistinctBatches(2),
            ckpt_path=ckpt_path,
        )

    def rows(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]

    fit(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(tmp_path / "parts", Die())
    fit(tmp_path / "parts", ckpt_path=tmp_path / "parts" / "c" / "last")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_an_empty_loader_is_one_clear_error(make_trainer):
    with pytest.raises(UserError, match="no batch"):
        make_trainer(max_steps=3).fit(TinyRegression(), train_dataloaders=[])


def test_best_is_never_what_is_not_a_number(make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(monitor="score", mode="max", dirpath=tmp_path / "c", every_n_train_steps=1)
    scores = iter([math.nan, 5.0, 7.0, 6.0, math.nan])

    class Score(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            trainer.log({"score": next(scores)})

    trainer = make_trainer(max_steps=5, callbacks=[Score(), checkpoint])
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
    assert checkpoint.best_model_score == 7.0
    assert (tmp_path / "c/best").resolve().name == "step=3" and (tmp_path / "c/last").resolve().name == "step=5"
    assert sorted(p.name for p in (tmp_path / "c").glob("step=*")) == ["step=3", "step=5"]


def test_max_steps_counts_updates_however_many_batches_they_take(make_trainer):
    trainer = make_trainer(max_steps=7, accumulate_grad_batches=10)
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(num_batches=25))
    assert (trainer.global_step, trainer.current_epoch, trainer.batch_idx) == (7, 2, 10)


class Unweighted(TinyRegression):
    def training_step(self, batch):
        return {"loss": super().training_step(batch)["loss"]}


def test_fit_gives_the_losses_of_a_bare_compiled_loop_to_the_last_bit(make_trainer):
    told = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            told.append(metrics["loss"].item())

    data = DistinctBatches()
    make_trainer(max_steps=12, callbacks=[Note()], gradient_clip_val=None).fit(Unweighted(), train_dataloaders=data)

    module, bare = Unweighted(), []
    optimizer = module.configure_optimizers()
    optimizer.init(module.trainable_parameters())
    state = [module.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(module, lambda batch: module.training_step(batch)["loss"])

    def update(batch):
        loss, grads = loss_and_grad(batch)
        optimizer.update(module, grads)
        return loss

    step = mx.compile(update, inputs=state, outputs=state)
    for i in range(12):
        batch = list(data.epoch(i // 6))[i % 6]
        mx.random.seed(step_seed(0, 0, i))
        loss = step({name: mx.array(array) for name, array in batch.items()})
        mx.eval(loss, state[:2])
        bare.append(loss.item())
    assert bare == told and len(told) == 12


def test_a_part_that_stays_in_evaluation_mode_is_still_so_after_every_stage(make_trainer):
    class HalfFrozen(TinyRegression):
        def predict_step(self, batch):
            return self.head(self.backbone(batch["x"]))

    module, data = HalfFrozen(), DistinctBatches(2)
    module.dropout.eval()
    trainer = make_trainer(max_steps=3, val_check_interval=1)
    trainer.fit(module, train_dataloaders=data, val_dataloaders=data)
    for stage in ("validate", "test", "predict"):
        getattr(trainer, stage)(module, dataloaders=data)
        assert not module.dropout.training and module.backbone.training and module.training


def test_metrics_leave_the_device_once_in_log_every_n_steps(make_trainer, tmp_path):
    logger = JSONLLogger(tmp_path / "log")
    trainer = make_trainer(max_steps=120, log_every_n_steps=50, logger=logger, callbacks=[LearningRateMonitor()])
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [50, 100]
    assert [row["step"] for row in rows if "lr" in row] == [50, 100]
    assert [row["step"] for row in rows if "train/loss_epoch" in row] == [*range(6, 121, 6)] and len(rows) == 4 + 20


BEFORE_FIT = {
    "global_step": 0,
    "current_epoch": 0,
    "batch_idx": 0,
    "accumulate_grad_batches": 1,
    "training_seconds": 0.0,
    "num_compiled_variants": 0,
    "callback_metrics": {},
    "logged_metrics": {},
    "estimated_stepping_batches": 7,
    "should_stop": False,
    "is_global_zero": True,
    "state": "initializing",
    "ckpt_path": None,
    "module": None,
    "optimizer": None,
    "datamodule": None,
}


@pytest.mark.parametrize("name", BEFORE_FIT)
def test_every_attribute_answers_before_fit(make_trainer, name):
    assert getattr(make_trainer(max_steps=7), name) == BEFORE_FIT[name]


@pytest.mark.parametrize("call", ["dump_checkpoint", "save_checkpoint"])
def test_what_needs_a_fit_says_so_before_it(make_trainer, tmp_path, call):
    arguments = (tmp_path / "c",) if call == "save_checkpoint" else ()
    with pytest.raises(UserError, match="nothing to save yet"):
        getattr(make_trainer(), call)(*arguments)
    assert not (tmp_path / "c").exists()


def test_a_run_without_limits_says_before_fit_that_max_steps_is_missing(make_trainer):
    with pytest.raises(UserError, match="set max_steps"):
        _ = make_trainer(max_epochs=-1).estimated_stepping_batches


def test_no_attribute_of_the_trainer_is_born_after_init(make_trainer):
    trainer = make_trainer(max_epochs=1)
    born = set(vars(trainer))
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(2), val_dataloaders=DistinctBatches(1))
    trainer.test(TinyRegression(), dataloaders=DistinctBatches(1))
    assert set(vars(trainer)) == born


@pytest.mark.parametrize("compiled", [True, False])
def test_at_most_six_frames_in_three_files_lie_between_the_loop_and_training_step(make_trainer, compiled):
    class Raises(TinyRegression):
        def training_step(self, batch):
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here") as error:
        make_trainer(max_steps=1, compile=compiled).fit(Raises(), train_dataloaders=DistinctBatches(1))
    frames = traceback.extract_tb(error.value.__traceback__)
    root = str(Path(mlxmm.__file__).parent)
    own = [frame for frame in frames if frame.filename.startswith(root)]
    from_loop = own[[frame.name for frame in own].index("_train") :]
    assert len(from_loop) <= 6 and len({frame.filename for frame in from_loop}) <= 3, from_loop


def test_callbacks_change_the_trainer_by_its_methods(make_trainer):
    class Doubles(Callback):
        def on_train_epoch_start(self, trainer, module):
            trainer.accumulate(trainer.current_epoch + 1)
            assert trainer.measure_phases() is trainer.profiler

    trainer = make_trainer(max_epochs=2, callbacks=[Doubles()])
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(6))
    assert trainer.global_step == 6 + 3 and trainer.profiler.counts["step"] == 9


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([2.0, 1.0, math.nan, math.nan], ["train/loss is nan after 3 updates"]),
        ([2.0, 30.0, 1.0, 30.0], ["train/loss is 30 after 2 updates"]),
        ([0.0, 5.0, 9.0, 2.0], []),
        ([-4.0, -3.0, 5.0, -4.0], []),
    ],
)
def test_a_loss_that_diverges_is_said_once(make_trainer, losses, told):
    class Told(TinyRegression):
        def training_step(self, batch):
            return {"loss": batch["loss"] + 0 * super().training_step(batch)["loss"]}

    data = [{**next(DistinctBatches().epoch(0)), "loss": np.float32(loss)} for loss in losses]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_epochs=1, log_every_n_steps=1).fit(Told(), data)
    lines = [str(w.message) for w in caught if "diverges" in str(w.message)]
    assert [line.split(":")[0] for line in lines] == told


@pytest.mark.parametrize(("decay_steps", "warns"), [(3, True), (30, False)])
def test_a_schedule_that_was_made_for_epochs_is_said(make_trainer, decay_steps, warns):
    class Decayed(TinyRegression):
        def configure_optimizers(self):
            return optim.AdamW(optim.cosine_decay(1e-2, decay_steps))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_epochs=3).fit(Decayed(), DistinctBatches())
    told = [str(warning.message) for warning in caught if "schedule counts updates" in str(warning.message)]
    assert bool(told) is warns and all("the learning rate is 0 from update 9 of 18 on" in line for line in told)
