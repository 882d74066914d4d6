"""The callbacks, one by one, on real training of a tiny module."""

import math
import time
import warnings

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    FreezeSchedule,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    ThroughputMonitor,
    Timer,
)
from mlxmm import Callback
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.training.callback import arrange_callbacks


def weights(module) -> dict:
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(module.parameters())}


def assert_same(left: dict, right: dict):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


class Crash(Callback):
    """Raises after an update."""

    def __init__(self, step: int):
        self.step = step

    def on_save_point(self, trainer, module):
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


class Scores(Callback):
    """Logs a score before the end of each validation: the one of the validation of that number."""

    def __init__(self, *scores):
        self.scores = scores

    def on_validation_epoch_end(self, trainer, module):
        trainer.log({"score": self.scores[trainer.global_step - 1]})


@pytest.fixture
def fit(make_trainer):
    def fit(*callbacks, module=None, data=None, ckpt_path=None, **settings):
        trainer, module = make_trainer(callbacks=callbacks, **settings), module or TinyRegression()
        trainer.fit(
            module,
            train_dataloaders=data or DistinctBatches(),
            val_dataloaders=DistinctBatches(2),
            ckpt_path=ckpt_path,
        )
        return trainer, module

    return fit


# ---------------------------------------------------------------------- EarlyStopping


@pytest.mark.parametrize(
    ("scores", "settings", "step", "reason"),
    [
        ((3, 2, 2, 2, 1), {"patience": 2}, 4, "did not improve in 2 validations; the best was 2"),
        ((3, 2, 1.9, 1.8, 1.7), {"patience": 2, "min_delta": 0.5}, 4, "did not improve in 2"),
        ((1, 2, 2.5, 2, 2), {"patience": 2, "mode": "max"}, 5, "the best was 2.5"),
        ((3, math.nan, 1, 1, 1), {}, 2, "score = nan is not finite"),
        ((3, -math.inf, 1, 1, 1), {}, 2, "score = -inf is not finite"),
        ((3, 2, 0.5, 1, 1), {"stopping_threshold": 1.0}, 3, "better than stopping_threshold=1.0"),
        ((3, 4, 11, 1, 1), {"divergence_threshold": 10.0}, 3, "worse than divergence_threshold=10.0"),
        ((3, 2, -1, 1, 1), {"divergence_threshold": 0.0, "mode": "max"}, 3, "score = -1 is worse"),
        ((math.nan, 3, math.nan, 2, 1), {"check_finite": False}, 5, None),
        ((5, 4, 3, 2, 1), {"patience": 1}, 5, None),
    ],
)
def test_early_stopping_ends_the_run_for_its_reason(fit, scores, settings, step, reason):
    stop = EarlyStopping("score", **settings)
    trainer, _ = fit(Scores(*scores), stop, max_steps=5, val_check_interval=1)
    assert trainer.global_step == step
    assert reason in stop.stopping_reason if reason else stop.stopping_reason is None


def test_early_stopping_counts_on_after_a_resume_and_a_stopped_run_stays_stopped(fit, make_trainer, tmp_path):
    scores, settings = Scores(3, 2, 2, 2, 2, 2, 2), {"val_check_interval": 1}
    keep = ModelCheckpoint(every_n_train_steps=1, dirpath=tmp_path / "c")
    fit(scores, EarlyStopping("score"), keep, max_steps=3, **settings)
    stop = EarlyStopping("score")
    trainer, _ = fit(
        scores,
        stop,
        ModelCheckpoint(every_n_train_steps=1, dirpath=tmp_path / "c"),
        ckpt_path=tmp_path / "c" / "last",
        max_steps=7,
        **settings,
    )
    assert trainer.global_step == 5 and (stop.wait_count, stop.best_score) == (3, 2)

    again, more = EarlyStopping("score"), EarlyStopping("score", patience=4)
    assert fit(scores, again, ckpt_path=tmp_path / "c" / "last", max_steps=7, **settings)[0].global_step == 5
    assert again.stopping_reason == stop.stopping_reason
    assert fit(scores, more, ckpt_path=tmp_path / "c" / "last", max_steps=7, **settings)[0].global_step == 6


def test_early_stopping_of_a_metric_that_is_not_there_is_one_clear_error(fit):
    with pytest.raises(UserError, match="nothing logs 'val/los'; did you mean val/loss"):
        fit(EarlyStopping("val/los"), max_steps=2, log_every_n_steps=1)


def test_early_stopping_does_nothing_in_a_fast_dev_run_or_outside_of_fit(fit, make_trainer):
    stop = EarlyStopping("no such metric")
    trainer, _ = fit(stop, fast_dev_run=2)
    assert trainer.global_step == 2
    make_trainer(callbacks=[stop]).validate(TinyRegression(), dataloaders=DistinctBatches())


# ---------------------------------------------------------------------- EMAWeightAveraging


def averaged(history: list[dict], decay: float, name: str) -> np.ndarray:
    """The average of what a weight was after each update, in float64."""
    average = history[0][name].astype(np.float64)
    for later in history[1:]:
        average = decay * average + (1 - decay) * later[name]
    return average


class History(Callback):
    """Remembers the weights after each update."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.weights.append(weights(module))


class SeeValidation(Callback):
    """Remembers the weights in, and right after, each validation."""

    def __init__(self):
        self.during, self.after = [], []

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        self.during.append(weights(module))

    def on_save_point(self, trainer, module):
        self.after.append(weights(module))


@pytest.mark.parametrize("compile", [True, False])
def test_ema_averages_every_update_and_the_module_ends_with_the_averages(fit, compile):
    ema, history = EMAWeightAveraging(0.9), History()
    trainer, module = fit(history, ema, max_steps=8, compile=compile)
    assert ema.n_averaged == trainer.global_step == 8
    trainer.test(module, dataloaders=DistinctBatches(1))
    for name, array in weights(module).items():
        np.testing.assert_allclose(array, averaged(history.weights, 0.9, name), rtol=1e-5, atol=1e-6)


def test_ema_leaves_training_alone_and_follows_its_schedule(fit):
    with_it, alone, ema = (
        History(),
        History(),
        EMAWeightAveraging(0.5, update_every_n_steps=2, update_starting_at_step=3),
    )
    fit(with_it, ema, max_steps=9, val_check_interval=1)
    fit(alone, max_steps=9, val_check_interval=1)
    for left, right in zip(with_it.weights, alone.weights, strict=True):
        assert_same(left, right)
    assert ema.n_averaged == 3  # updates 4, 6 and 8, counted from 0
    expected = averaged([alone.weights[step] for step in (4, 6, 8)], 0.5, "head.weight")
    np.testing.assert_allclose(np.array(ema.averages["head.weight"]), expected, rtol=1e-5)


def test_validation_sees_the_averages_and_training_gets_its_weights_back_to_the_bit(fit):
    ema, history, see = EMAWeightAveraging(0.9), History(), SeeValidation()
    fit(history, ema, see, max_steps=6, val_check_interval=3, num_sanity_val_steps=0)
    assert len(see.during) == 4  # two validations of two batches
    for name, array in see.during[-1].items():
        np.testing.assert_allclose(array, averaged(history.weights, 0.9, name), rtol=1e-5, atol=1e-6)
    for trained, after in zip(history.weights, see.after, strict=True):
        assert_same(trained, after)


def test_a_validation_that_raises_gives_the_weights_back_to_the_bit_and_what_is_saved_then_is_right(fit, tmp_path):
    class Fail(Callback):
        def on_validation_batch_end(self, trainer, module, batch, batch_idx):
            raise RuntimeError("in validation")

    module, history, ema = TinyRegression(), History(), EMAWeightAveraging(0.9)
    save = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="in validation"):
        fit(save, history, ema, Fail(), module=module, max_steps=6, val_check_interval=3)
    assert_same(history.weights[-1], weights(module))
    assert arrange_callbacks([save, ema]) == [ema, save]
    saved = checkpoint.load(save.ckpt_path)
    assert_same(saved["raw_weights"], weights(module))
    assert_same(saved["weights"], {name: np.array(array) for name, array in ema.averages.items()})


def test_test_and_predict_of_an_interrupted_run_see_the_averages_and_give_the_weights_back(fit, make_trainer):
    class Predicts(TinyRegression):
        def predict_step(self, batch):
            return self.head.weight

    module, ema, seen = Predicts(), EMAWeightAveraging(0.9), []
    look = LambdaCallback(on_test_batch_start=lambda trainer, module, *_: seen.append(weights(module)))
    trainer = make_trainer(callbacks=[ema, look, Crash(5)], max_steps=9)
    with pytest.raises(RuntimeError):
        trainer.fit(module, train_dataloaders=DistinctBatches())
    raw = weights(module)
    trainer.test(module, dataloaders=DistinctBatches(1))
    assert_same(seen[0], {name: np.array(ema.averages[name]) for name in raw})
    (predicted,) = trainer.predict(module, dataloaders=DistinctBatches(1))
    assert mx.array_equal(predicted, ema.averages["head.weight"])
    assert_same(raw, weights(module))
    other = TinyRegression()
    trainer.test(other, dataloaders=DistinctBatches(1))
    assert_same(seen[1], weights(other))


@pytest.mark.parametrize("crash_at", [1, 3, 5])
def test_a_resumed_ema_run_is_the_run_that_was_never_stopped(fit, tmp_path, crash_at):
    def callbacks(folder):
        freeze = FreezeSchedule({0: "head", 4: ("head", "backbone")}, unit="step")
        keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, dirpath=folder, background=False)
        return freeze, EMAWeightAveraging(0.8), keep

    settings = {"max_steps": 9, "val_check_interval": 2}
    whole, module = fit(*callbacks(tmp_path / "whole"), **settings)
    with pytest.raises(RuntimeError):
        # Saved before it crashes: the Crash is told last.
        crash = Crash(crash_at)
        crash.saves_checkpoints = True
        fit(*callbacks(tmp_path / "parts"), crash, **settings)
    last = tmp_path / "parts" / "last"
    assert checkpoint.read_state(last)["global_step"] == crash_at
    ends, resumed = callbacks(tmp_path / "parts"), None
    trainer, resumed = fit(*ends, ckpt_path=last, **settings)
    assert_same(weights(module), weights(resumed))
    assert ends[1].n_averaged == whole.callbacks[1].n_averaged == 9
    assert trainer.callback_metrics["val/loss"] == whole.callback_metrics["val/loss"]
    left, right = (checkpoint.load(tmp_path / part / "step=9") for part in ("whole", "parts"))
    for kind in ("weights", "raw_weights", "optimizer"):
        assert_same(left[kind], right[kind])


def test_the_last_checkpoint_of_an_ema_run_goes_on_like_any_other_also_one_saved_by_hand(fit, tmp_path):
    _, whole = fit(EMAWeightAveraging(0.8), max_steps=9)
    trainer, module = fit(EMAWeightAveraging(0.8), ModelCheckpoint(dirpath=tmp_path / "c"), max_steps=4)
    trainer.save_checkpoint(tmp_path / "by_hand")
    for path in (tmp_path / "c" / "last", tmp_path / "by_hand"):
        assert_same(checkpoint.load(path)["weights"], weights(module))
        _, resumed = fit(EMAWeightAveraging(0.8), max_steps=9, ckpt_path=path)
        assert_same(weights(whole), weights(resumed))


def test_frozen_parameters_are_not_averaged_and_join_when_they_are_opened(fit):
    ema = EMAWeightAveraging(0.9)
    names = []
    look = LambdaCallback(on_train_batch_end=lambda *_: names.append(sorted(ema.averages)))
    history = History()
    schedule = FreezeSchedule({0: "head", 3: ("head", "backbone.weight")}, unit="step")
    _, module = fit(schedule, history, ema, look, max_steps=6)
    head = ["head.bias", "head.weight"]
    assert names == [head] * 3 + [["backbone.weight", *head]] * 3
    opened = averaged(history.weights[3:], 0.9, "backbone.weight")
    np.testing.assert_allclose(np.array(module.backbone.weight), opened, rtol=1e-5, atol=1e-6)
    assert_same({"": np.array(module.backbone.bias)}, {"": weights(TinyRegression())["backbone.bias"]})


def test_averages_of_half_precision_weights_keep_small_steps_and_leave_the_dtype_alone(fit):
    ema, history = EMAWeightAveraging(0.999), History()
    _, module = fit(history, ema, max_steps=4, precision="bf16-true", val_check_interval=2)
    expected = averaged(history.weights, 0.999, "head.weight")
    np.testing.assert_allclose(np.array(ema.averages["head.weight"]), expected, rtol=1e-5)
    assert {a.dtype for _, a in tree_flatten(module.parameters())} == {mx.bfloat16}


# ---------------------------------------------------------------------- Timer


def test_timer_ends_the_run_after_its_duration_and_counts_what_came_before_a_resume(fit, tmp_path):
    nap = LambdaCallback(on_train_batch_end=lambda *_: time.sleep(0.3))
    timer, keep = Timer("00:01"), ModelCheckpoint(dirpath=tmp_path / "c")
    trainer, _ = fit(nap, timer, keep, max_steps=50)
    assert 1 <= trainer.global_step <= 4 and timer.time_elapsed() >= 1 and timer.time_remaining() <= 0

    late = Timer("00:01")
    again, _ = fit(nap, late, max_steps=50, ckpt_path=tmp_path / "c" / "last")
    assert again.global_step == trainer.global_step and late.time_elapsed() >= 1


def test_timer_by_epoch_ends_the_run_at_an_epochs_end_and_knows_each_stages_seconds(fit):
    nap = LambdaCallback(
        on_train_batch_start=lambda *_: time.sleep(0.36), on_validation_batch_start=lambda *_: time.sleep(0.05)
    )
    timer = Timer("00:01", interval="epoch")
    trainer, _ = fit(timer, nap, data=DistinctBatches(4), max_epochs=9, num_sanity_val_steps=0)
    assert trainer.global_step == 4
    assert timer.time_elapsed("validate") >= 0.1
    assert timer.time_elapsed("train") >= 4 * 0.36 + timer.time_elapsed("validate")
    assert timer.time_elapsed("test") == 0 and Timer().time_remaining() is None
    with pytest.raises(UserError, match="unknown stage 'training'; choose one of train, validate"):
        timer.time_elapsed("training")
    with pytest.raises(ValueError, match="days:hours:minutes:seconds"):
        Timer("an hour")


# ---------------------------------------------------------------------- GradientAccumulationScheduler


def test_accumulation_follows_the_epochs_and_survives_a_resume(fit, tmp_path):
    def sizes(into):
        return LambdaCallback(on_train_batch_start=lambda trainer, module, batches: into.append(len(batches)))

    def schedule():
        return GradientAccumulationScheduler({1: 4, 3: 2})

    whole, parts = [], []
    trainer, module = fit(schedule(), sizes(whole), max_epochs=4)
    assert whole == [1] * 6 + [4, 2] * 2 + [2] * 3 and trainer.global_step == 13
    keep = ModelCheckpoint(dirpath=tmp_path / "c")
    fit(schedule(), sizes(parts), keep, max_steps=7)  # in the middle of the epoch of fours
    _, resumed = fit(schedule(), sizes(parts), max_epochs=4, ckpt_path=tmp_path / "c" / "last")
    assert parts == whole
    assert_same(weights(module), weights(resumed))


@pytest.mark.parametrize("wrong", [{}, {-1: 2}, {0: 0}, {0: 1.5}, 4])
def test_a_wrong_accumulation_schedule_is_one_clear_error(wrong):
    with pytest.raises(UserError, match="needs {epoch: batches per update}|is not of type Mapping"):
        GradientAccumulationScheduler(wrong)


def test_two_ways_to_accumulate_are_one_too_many(fit):
    with pytest.raises(UserError, match="accumulate_grad_batches=2 and Gradient"):
        fit(GradientAccumulationScheduler({0: 2}), accumulate_grad_batches=2, max_steps=1)


# ---------------------------------------------------------------------- LambdaCallback


def test_lambda_callback_calls_each_function_at_its_moment_and_no_other(fit):
    heard = []
    hear = LambdaCallback(
        on_train_start=lambda trainer, module: heard.append(type(module).__name__),
        on_train_batch_end=lambda trainer, *_: heard.append(trainer.global_step),
    )
    trainer, _ = fit(hear, max_steps=2)
    assert heard == ["TinyRegression", 1, 2]
    assert [len(trainer._hooks[name]) for name in ("on_train_start", "on_before_optimizer_step")] == [1, 0]


def test_lambda_callback_knows_its_hooks():
    with pytest.raises(UserError, match="unknown hook on_train_batch_begin; known are setup, teardown"):
        LambdaCallback(on_train_batch_begin=print)
    with pytest.raises(UserError, match="on_train_start must be a function: 3"):
        LambdaCallback(on_train_start=3)


# ---------------------------------------------------------------------- OnExceptionCheckpoint


class FailingStep(TinyRegression):
    """Raises while the third update's step is traced for a new batch shape."""

    def training_step(self, batch):
        if batch["x"].shape[0] == 3:
            raise RuntimeError("in the step")
        return super().training_step(batch)


def test_a_failed_trace_leaves_a_checkpoint_that_loads_and_goes_on_exactly(fit, tmp_path):
    data = DistinctBatches()
    broken = DistinctBatches()
    order = np.random.default_rng(0).permutation(6)
    broken.batches[order[2]] = {name: array[:3] for name, array in broken.batches[order[2]].items()}
    save = OnExceptionCheckpoint(tmp_path / "folder", "failed")
    with pytest.raises(RuntimeError, match="in the step"):
        fit(save, module=FailingStep(), data=broken, max_steps=8)
    assert checkpoint.read_state(save.ckpt_path)["global_step"] == 2

    _, whole = fit(data=data, max_steps=8)
    _, resumed = fit(
        OnExceptionCheckpoint(tmp_path / "folder", "failed"), data=data, max_steps=8, ckpt_path=save.ckpt_path
    )
    assert_same(weights(whole), weights(resumed))
    assert save.ckpt_path.exists()  # a run that ends well leaves it there


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_train_epoch_end"])
def test_an_exception_in_any_hook_leaves_a_checkpoint_that_goes_on_exactly(fit, tmp_path, hook):
    def fail(trainer, *_):
        if trainer.global_step == 6:  # the last update of the first epoch
            raise KeyboardInterrupt

    save = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(save, LambdaCallback(**{hook: fail}), max_steps=14)
    assert checkpoint.read_state(save.ckpt_path)["global_step"] == 6
    whole, resumed = fit(max_steps=14), fit(max_steps=14, ckpt_path=save.ckpt_path)
    assert resumed[0].current_epoch == whole[0].current_epoch == 2
    assert_same(weights(whole[1]), weights(resumed[1]))


def test_half_an_update_is_not_saved(fit, tmp_path):
    trainers = []

    class Interrupt(optim.SGD):
        def apply_gradients(self, gradients, parameters):
            updated = super().apply_gradients(gradients, parameters)
            if trainers[0].global_step == 2:
                raise KeyboardInterrupt
            return updated

    class Module(TinyRegression):
        def configure_optimizers(self):
            return Interrupt(0.1)

    save, snapshot = OnExceptionCheckpoint(tmp_path), LambdaCallback(on_fit_start=lambda t, _: trainers.append(t))
    with pytest.warns(UserWarning, match="an update was incomplete"), pytest.raises(KeyboardInterrupt):
        fit(save, snapshot, module=Module(), max_steps=8, compile=False)
    assert not save.ckpt_path.exists()


def test_what_cannot_be_saved_does_not_hide_the_exception_that_ended_the_run(fit, make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be saved"), pytest.raises(RuntimeError, match="crash"):
        fit(OnExceptionCheckpoint(tmp_path / "file"), Crash(2), max_steps=3)
    early = LambdaCallback(setup=lambda trainer, *_: Crash(0).on_save_point(trainer, None))
    with warnings.catch_warnings(action="error"), pytest.raises(RuntimeError, match="crash"):
        fit(OnExceptionCheckpoint(tmp_path), early)  # no run yet, so nothing to save, and nothing to warn of
    assert not (tmp_path / "on_exception").exists()


# ---------------------------------------------------------------------- monitors


class Stopwatch:
    """Adds up the seconds between `start` and `stop`."""

    def __init__(self):
        self.seconds = 0.0

    def start(self, *_):
        self._started = time.perf_counter()

    def stop(self, *_):
        self.seconds += time.perf_counter() - self._started

    def nap(self, *_):
        self.start()
        time.sleep(0.02)
        self.stop()


def test_throughput_counts_the_wait_for_data_but_neither_validation_nor_saving(fit):
    run, steps, data, apart = (Stopwatch() for _ in range(4))

    class SlowBatches(DistinctBatches):
        def epoch(self, epoch, start=0):
            for batch in super().epoch(epoch, start):
                data.nap()
                yield batch

    monitor = ThroughputMonitor(length_fn=lambda batch: batch["x"].size, flops_per_batch=1e6, peak_flops=1e9)
    outside = LambdaCallback(on_train_start=run.start, on_train_batch_end=steps.stop, on_train_end=run.stop)
    inside = LambdaCallback(on_train_batch_start=steps.start, on_validation_start=apart.nap)
    save = LambdaCallback(on_save_point=apart.nap)
    save.saves_checkpoints = True
    trainer, _ = fit(
        save, outside, monitor, inside, data=SlowBatches(), max_steps=12, val_check_interval=1, log_every_n_steps=6
    )
    told = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("throughput/")}
    told = {name.removeprefix("throughput/"): value for name, value in told.items()}
    rate = told["batches_per_second"]
    seconds = 12 / rate
    assert data.seconds + steps.seconds <= seconds <= run.seconds - apart.seconds
    assert data.seconds <= told["data_wait_fraction"] * seconds <= seconds - steps.seconds
    exact = {"examples_per_second": 4, "tokens_per_second": 16, "flops_per_second": 1e6, "mfu": 1e-3}
    for name, factor in exact.items():
        assert told[name] == pytest.approx(factor * rate)


def test_throughput_counts_each_batch_of_an_update(fit):
    monitor = ThroughputMonitor()
    trainer, _ = fit(monitor, max_epochs=2, accumulate_grad_batches=4, log_every_n_steps=4)
    assert [counts[2:4] for counts in monitor._window] == [(4, 16), (2, 8)] * 2
    assert {name for name in trainer.callback_metrics if "throughput" in name} == {
        f"throughput/{name}" for name in ("examples_per_second", "batches_per_second", "data_wait_fraction")
    }


def test_device_stats_are_those_of_mlx_and_of_the_process(fit):
    trainer, _ = fit(DeviceStatsMonitor(), max_steps=2, log_every_n_steps=2)
    held = mx.zeros(64 * 2**18) + 1  # 64 MiB
    mx.eval(held)
    more, _ = fit(DeviceStatsMonitor(), max_steps=2, log_every_n_steps=2)
    names = ["active"] if mx.cuda.is_available() else ["active", "process"]  # a card's memory is not the process's
    for name in names:
        grown = more.callback_metrics[f"memory/{name}_mib"] - trainer.callback_metrics[f"memory/{name}_mib"]
        assert 60 < grown < 80, name
    assert more.callback_metrics["memory/peak_mib"] >= more.callback_metrics["memory/active_mib"]
    assert more.callback_metrics["memory/cache_mib"] >= 0


class TwoOptimizers(TinyRegression):
    def configure_optimizers(self):
        falling = optim.exponential_decay(0.1, 0.5)
        return optim.MultiOptimizer([optim.SGD(0.01), optim.Adam(falling)], [lambda name, _: "bias" in name])


def test_the_learning_rates_of_several_optimizers_have_a_curve_each(fit, tmp_path):
    trainer, module = fit(LearningRateMonitor(), module=TwoOptimizers(), max_steps=3, log_every_n_steps=1)
    rates = {name: rate for name, rate in trainer.callback_metrics.items() if name.startswith("lr")}
    assert rates == {"lr/0": pytest.approx(0.01), "lr/1": pytest.approx(0.025)}
    single, _ = fit(LearningRateMonitor(), max_steps=1, log_every_n_steps=1)
    assert [name for name in single.callback_metrics if name.startswith("lr")] == ["lr"]

    fit(ModelCheckpoint(dirpath=tmp_path / "c"), module=TwoOptimizers(), max_steps=2)
    _, resumed = fit(module=TwoOptimizers(), max_steps=3, ckpt_path=tmp_path / "c" / "last")
    assert_same(weights(module), weights(resumed))
