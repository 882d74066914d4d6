"""The loops' settings: how many batches, how long, when to validate, and what a run may touch."""

import random
import time

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from callbacks import GradientAccumulationScheduler, LossSpikeGuard, ModelCheckpoint, ModelSummary, TQDMProgressBar
from mlxmm import Callback, TrainerConfig, seed_everything
from mlxmm.errors import UserError


def weights(module):
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def assert_same(left, right, atol=0.0):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=atol, err_msg=name)


class Seen(Callback):
    """What happened: the first number of every batch, by epoch, and at which updates validation came."""

    def __init__(self):
        self.epochs, self.validated, self.val_batches, self.losses = {}, [], 0, []

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.epochs.setdefault(trainer.current_epoch, []).extend(batch["x"][0, 0].item() for batch in batches)
        self.losses.append(metrics["loss"].item())

    def on_validation_batch_end(self, trainer, module, batch, batch_idx):
        self.val_batches += 1

    def on_validation_end(self, trainer, module, metrics):
        self.validated.append(trainer.global_step)


def fit(make_trainer, *others, val=2, train=6, module=None, **settings):
    seen = Seen()
    trainer = make_trainer(callbacks=[*others, seen], **settings)
    val_data = DistinctBatches(val) if val else None
    trainer.fit(module or TinyRegression(), train_dataloaders=DistinctBatches(train), val_dataloaders=val_data)
    return trainer, seen


@pytest.mark.parametrize(
    ("limit", "updates"), [(4, 4), (0.5, 3), (1.0, 6), (1, 1), (100, 6), (0.4, 2)], ids=lambda value: str(value)
)
def test_limit_train_batches_is_a_number_or_a_fraction(make_trainer, limit, updates):
    trainer, seen = fit(make_trainer, max_epochs=2, limit_train_batches=limit)
    assert [len(batches) for batches in seen.epochs.values()] == [updates, updates]
    assert trainer.global_step == trainer.estimated_stepping_batches == 2 * updates


@pytest.mark.parametrize(("limit", "count"), [(3, 3), (0.5, 2), (0, 0), (1.0, 5)])
def test_validation_test_and_predict_are_limited_by_number_or_fraction(make_trainer, limit, count):
    class Predicts(TinyRegression):
        def predict_step(self, batch):
            return self.head(self.backbone(batch["x"]))

    data, module = DistinctBatches(5), Predicts()
    _, seen = fit(make_trainer, val=5, max_epochs=1, limit_val_batches=limit, num_sanity_val_steps=0)
    assert seen.val_batches == count
    predicted = make_trainer(limit_predict_batches=limit).predict(module, dataloaders=data)
    assert len(predicted) == count
    tested = make_trainer(limit_test_batches=limit).test(module, dataloaders=data)
    order = np.random.default_rng(0).permutation(5)[:count]
    short = [data.batches[i] for i in order]
    expected = make_trainer().test(module, dataloaders=short) if count else {}
    assert tested == expected


def test_predict_gives_an_entry_for_each_batch_without_dropout(make_trainer):
    class Predicts(TinyRegression):
        def predict_step(self, batch):
            return {"y": self.head(self.dropout(self.backbone(batch["x"])))}

    module, data = Predicts(dropout=0.9), DistinctBatches(4).batches
    outputs = make_trainer().predict(module, dataloaders=data)
    assert len(outputs) == 4 and module.dropout.training
    for output, batch in zip(outputs, data):
        expected = module.head(module.backbone(mx.array(batch["x"])))
        np.testing.assert_allclose(np.array(output["y"]), np.array(expected), atol=1e-6)


def test_overfit_batches_sees_the_same_batches_in_every_epoch_and_validates_on_them(make_trainer):
    module = TinyRegression(dropout=0.0)
    trainer, seen = fit(make_trainer, module=module, max_epochs=4, overfit_batches=2)
    first, *rest = seen.epochs.values()
    assert len(set(first)) == 2 and all(batches == first for batches in rest)
    assert seen.val_batches == 4 * 2 and trainer.global_step == 8
    order = np.random.default_rng(0).permutation(6)[:2]
    same = [DistinctBatches().batches[i] for i in order]
    told = make_trainer().validate(module, dataloaders=same)["val/loss"]
    assert trainer.callback_metrics["val/loss"] == pytest.approx(told, rel=1e-5)


def test_without_overfitting_every_epoch_has_its_own_order(make_trainer):
    _, seen = fit(make_trainer, max_epochs=2)
    first, second = seen.epochs.values()
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize("number", [1, 3])
def test_fast_dev_run_tries_everything_and_writes_nothing(make_trainer, tmp_path, number):
    callbacks = [ModelCheckpoint(every_n_train_steps=1), TQDMProgressBar(), ModelSummary()]
    trainer, seen = fit(make_trainer, *callbacks, val=5, fast_dev_run=number, logger=True, max_steps=100)
    assert trainer.global_step == number and seen.val_batches == number and not trainer.loggers
    assert not list(tmp_path.iterdir())


def test_max_time_ends_a_run_and_counts_what_came_before_a_resume(make_trainer, tmp_path):
    class Slow(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            time.sleep(0.3)

    save = ModelCheckpoint(dirpath=tmp_path / "c")
    first, _ = fit(make_trainer, Slow(), save, max_steps=2, val=0)
    assert first.training_seconds >= 0.6
    trainer = make_trainer(max_time="00:01", callbacks=[Slow()])
    start = time.perf_counter()
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(), ckpt_path=tmp_path / "c/last")
    assert time.perf_counter() - start < 1.0 < trainer.training_seconds < 1.9
    assert 2 < trainer.global_step < 6


@pytest.mark.parametrize(
    ("settings", "stops_at"),
    [
        ({}, 2),
        ({"min_steps": 5}, 5),
        ({"min_epochs": 1}, 6),
        ({"min_epochs": 2, "min_steps": 3}, 12),
        ({"min_steps": 9}, 9),
    ],
)
def test_should_stop_waits_for_min_steps_and_min_epochs(make_trainer, settings, stops_at):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            if trainer.global_step == 2:
                trainer.should_stop = True

    if settings:
        with pytest.warns(UserWarning, match="training continues until"):
            trainer, seen = fit(make_trainer, Stop(), max_epochs=5, **settings)
    else:
        trainer, seen = fit(make_trainer, Stop(), max_epochs=5)
    assert trainer.global_step == stops_at and seen.validated[-1] == stops_at


@pytest.mark.parametrize(
    ("settings", "validated"),
    [
        ({}, [6, 12, 18]),
        ({"val_check_interval": 0.5}, [3, 6, 9, 12, 15, 18]),
        ({"val_check_interval": 0.34}, [2, 4, 6, 8, 10, 12, 14, 16, 18]),
        ({"val_check_interval": 4}, [4, 8, 12, 16, 18]),
        ({"check_val_every_n_epoch": 2}, [12, 18]),
        ({"check_val_every_n_epoch": 2, "val_check_interval": 0.5}, [9, 12, 18]),
        ({"val_check_interval": 0.5, "accumulate_grad_batches": 2}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"val_check_interval": 0.67, "accumulate_grad_batches": 2}, [2, 5, 8, 9]),
        ({"check_val_every_n_epoch": 5}, [18]),
    ],
)
def test_validation_comes_when_it_is_due(make_trainer, settings, validated):
    _, seen = fit(make_trainer, max_epochs=3, **settings)
    assert seen.validated == validated


def test_value_clipping_bounds_each_number_and_norm_clipping_their_length(make_trainer):
    class Steps(Callback):
        def on_train_start(self, trainer, module):
            self.before, self.steps = weights(module), []

        def on_train_batch_end(self, trainer, module, metrics, batches):
            now = weights(module)
            self.steps.append(
                (np.concatenate([(self.before[n] - now[n]).ravel() for n in now]), metrics["grad_norm"].item())
            )
            self.before = now

    class PlainSGD(TinyRegression):
        def configure_optimizers(self):
            return optim.SGD(1.0)

    def steps_of(**settings):
        watch = Steps()
        fit(make_trainer, watch, module=PlainSGD(dropout=0.0), max_steps=1, **settings)
        return watch.steps[0]

    whole, norm = steps_of(gradient_clip_val=None)
    by_value, told = steps_of(gradient_clip_val=0.1, gradient_clip_algorithm="value")
    np.testing.assert_allclose(by_value, whole.clip(-0.1, 0.1), atol=1e-6)
    by_norm, _ = steps_of(gradient_clip_val=0.1)
    np.testing.assert_allclose(by_norm, whole * 0.1 / norm, atol=1e-6)
    assert np.linalg.norm(whole) == pytest.approx(norm, rel=1e-5) == told and np.abs(whole).max() > 0.1


@pytest.mark.parametrize("draws", ["none", "all"])
def test_the_sanity_check_touches_no_random_state_and_no_result(make_trainer, draws):
    states = []

    def state():
        return mx.random.state[0].tolist(), np.random.get_state()[1].tolist(), random.getstate()

    class Draws(Callback):
        def on_fit_start(self, trainer, module):
            states.append(state())

        def on_sanity_check_start(self, trainer, module):
            if draws == "all":
                mx.eval(mx.random.normal((3,)))
                np.random.random(), random.random()

        def on_train_start(self, trainer, module):
            states.append(state())

    class Random(TinyRegression):
        def validation_step(self, batch):
            return {"loss": mx.random.normal()}

    checked, alone = Random(), Random()
    _, seen = fit(make_trainer, Draws(), module=checked, max_steps=4)
    assert states[0] == states[1]
    _, seen_alone = fit(make_trainer, module=alone, max_steps=4, num_sanity_val_steps=0)
    assert_same(weights(checked), weights(alone))
    assert seen.validated == seen_alone.validated == [4] and seen.val_batches == 2


def test_the_sanity_check_finds_an_error_in_validation_before_the_first_update(make_trainer):
    class Fails(TinyRegression):
        def validation_step(self, batch):
            raise RuntimeError("in validation")

    for steps, updates in ((2, 0), (0, 6)):
        trainer = make_trainer(max_steps=9, num_sanity_val_steps=steps)
        with pytest.raises(RuntimeError, match="in validation"):
            trainer.fit(Fails(), train_dataloaders=DistinctBatches(), val_dataloaders=DistinctBatches(2))
        assert trainer.global_step == updates


def test_deterministic_stops_where_an_update_computed_twice_differs_and_changes_nothing_else(make_trainer):
    class Chance(TinyRegression):
        def training_step(self, batch):
            outputs = super().training_step(batch)
            return outputs | {"loss": outputs["loss"] * next(self.numbers)}

    module = Chance()
    object.__setattr__(module, "numbers", iter(np.arange(1.0, 99.0)))
    with pytest.raises(RuntimeError, match="two values of backbone"):
        make_trainer(max_steps=3, deterministic=True, compile=False).fit(module, train_dataloaders=DistinctBatches())

    checked, alone = TinyRegression(), TinyRegression()
    fit(make_trainer, module=checked, max_steps=5, deterministic=True)
    fit(make_trainer, module=alone, max_steps=5)
    assert_same(weights(checked), weights(alone))


def test_the_profiler_accounts_for_the_time_of_a_run(make_trainer, capsys):
    class Slow(DistinctBatches):
        def epoch(self, epoch, start=0):
            for batch in super().epoch(epoch, start):
                time.sleep(0.02)
                yield batch

    class Sleep(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            time.sleep(0.03)

        def on_validation_start(self, trainer, module):
            time.sleep(0.1)  # counted once, as a callback's, though validation is under way

        def on_train_start(self, trainer, module):
            self.start = time.perf_counter()

        def on_train_end(self, trainer, module):
            self.seconds = time.perf_counter() - self.start

    make_trainer(max_epochs=1).fit(TinyRegression(), DistinctBatches(), DistinctBatches(2))  # compiles the kernels
    sleep = Sleep()
    trainer = make_trainer(
        max_epochs=2, profiler="simple", callbacks=[sleep], log_every_n_steps=1, num_sanity_val_steps=0
    )
    trainer.fit(TinyRegression(), train_dataloaders=Slow(), val_dataloaders=DistinctBatches(2))
    seconds, counts = trainer.profiler.seconds, trainer.profiler.counts
    assert {"data", "step", "validation", "callbacks", "logging"} <= set(seconds)
    assert sum(seconds.values()) == pytest.approx(sleep.seconds, rel=0.1)
    assert 0.24 <= seconds["data"] and 0.56 <= seconds["callbacks"]
    assert counts["step"] == 12 and counts["validation"] == 2 and counts["logging"] == 16
    table = capsys.readouterr().out
    assert table.startswith("phase") and all(name in table for name in seconds)


def test_a_share_of_data_of_unknown_length_is_one_clear_error(make_trainer):
    class NoLength:
        def __iter__(self):
            return iter(DistinctBatches().batches)

    with pytest.raises(UserError, match="give a number of batches"):
        make_trainer(max_steps=2, limit_train_batches=0.5).fit(TinyRegression(), train_dataloaders=NoLength())
    trainer = make_trainer(max_epochs=2, limit_train_batches=4, num_sanity_val_steps=0)
    trainer.fit(TinyRegression(dropout=0.0), train_dataloaders=NoLength())
    assert trainer.global_step == 8


@pytest.mark.parametrize("value", [0, 0.0])
def test_a_clip_value_of_0_clips_nothing(make_trainer, value):
    modules = [TinyRegression(dropout=0.0) for _ in range(2)]
    for module, limit in zip(modules, (value, None)):
        fit(make_trainer, module=module, max_steps=3, gradient_clip_val=limit, compile=False)
    assert_same(*map(weights, modules))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"val_check_interval": 0}, "'val_check_interval' must not be 0: limit_val_batches=0 switches validation off"),
        ({"val_check_interval": 0.0}, "'val_check_interval' must not be 0"),
        ({"limit_train_batches": 0}, "limit_train_batches=0 leaves nothing to train on"),
        ({"limit_train_batches": 0.0}, "limit_train_batches=0 leaves nothing to train on"),
        ({"limit_train_batches": 0.01}, "a limit of 0.01 leaves none of 6 batches .*: give 0.17 or more"),
        ({"overfit_batches": 0.01}, "a limit of 0.01 leaves none of 6 batches"),
        ({"limit_val_batches": 0.4}, "a limit of 0.4 leaves none of 2 batches .*: give 0.5 or more"),
    ],
    ids=str,
)
def test_a_limit_that_leaves_nothing_is_refused_before_the_first_update(make_trainer, settings, told):
    started = []

    class Started(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            started.append(True)

    with pytest.raises(UserError, match=told):
        fit(make_trainer, Started(), max_steps=3, **settings)
    assert not started


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_limit_that_leaves_nothing_is_refused_in_every_stage(make_trainer, stage):
    trainer = make_trainer(**{f"limit_{stage}_batches": 0.01})
    with pytest.raises(UserError, match="a limit of 0.01 leaves none of 2 batches"):
        getattr(trainer, stage)(TinyRegression(), DistinctBatches(2))


def test_numbers_of_numpy_are_numbers(make_trainer):
    settings = {"max_epochs": np.int64(2), "limit_train_batches": np.int32(3), "seed": np.int64(2**20)}
    config = TrainerConfig(**settings, val_check_interval=np.float32(0.5), gradient_clip_val=np.float64(0))
    values = config.max_epochs, config.limit_train_batches, config.val_check_interval, config.gradient_clip_val
    assert [type(value) for value in values] == [int, int, float, float]
    scheduler = GradientAccumulationScheduler({np.int64(0): np.int64(2)})
    trainer, seen = fit(make_trainer, scheduler, config=config, compile=False)
    assert trainer.global_step == 4 and [len(read) for read in seen.epochs.values()] == [3, 3]
    seed_everything(np.int64(5))
    drawn = np.random.rand()
    seed_everything(5)
    assert drawn == np.random.rand()


@pytest.mark.parametrize(("scheduling", "updates"), [({0: 4}, 6), ({0: 4, 2: 1}, 10), ({1: 6}, 8)])
def test_an_accumulation_schedule_is_part_of_the_length_of_the_run(make_trainer, scheduling, updates):
    told = []

    class Asks(TinyRegression):
        def configure_optimizers(self):
            told.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    scheduler = GradientAccumulationScheduler(scheduling)
    trainer, _ = fit(make_trainer, scheduler, module=Asks(), max_epochs=3, compile=False)
    assert told == [updates] and trainer.global_step == trainer.estimated_stepping_batches == updates


class Weighted(TinyRegression):
    """The mean over what is supervised, which is nan where nothing is."""

    def __init__(self):
        super().__init__(dropout=0.0)


def supervised(*weights_of_batches):
    batches = DistinctBatches(len(weights_of_batches)).batches
    return [batch | {"mask": batch["mask"] * weight} for batch, weight in zip(batches, weights_of_batches)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_of_weight_0_changes_nothing(make_trainer, accumulate, compiled):
    module, without, settings = Weighted(), Weighted(), {"gradient_clip_val": None, "compile": compiled}
    for net, data in ((module, supervised(1, 0, 1)), (without, [supervised(1, 0, 1)[i] for i in (0, 2)])):
        trainer = make_trainer(max_steps=3 if accumulate == 1 else 1, accumulate_grad_batches=accumulate, **settings)
        trainer.fit(net, train_dataloaders=data)
        assert all(np.isfinite(array).all() for array in weights(net).values())
    if accumulate > 1:
        assert_same(weights(module), weights(without), atol=1e-6)
    measure = lambda data: make_trainer(compile=compiled).validate(module, data)
    assert measure(supervised(1, 0, 1)) == measure([supervised(1, 0, 1)[i] for i in (0, 2)])
    with pytest.warns(UserWarning, match="all batches of this evaluation have weight 0"):
        assert measure(supervised(0, 0)) == {}


def test_updates_of_weight_0_are_no_spikes_and_do_not_lower_the_mean(make_trainer):
    guard = LossSpikeGuard(window=2, rtol=1.0)
    trainer = make_trainer(max_steps=8, callbacks=[guard], compile=False, log_every_n_steps=1)
    trainer.fit(Weighted(), train_dataloaders=supervised(1, 1, 0, 0, 0, 1, 1, 0))
    assert guard.num_skipped == 0 and len(guard.losses) == 2 and min(guard.losses) > 0
