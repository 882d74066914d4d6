"""LearningRateFinder and BatchSizeFinder: what they find, and that they leave everything as it was."""

import random

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from callbacks import BatchSizeFinder, LearningRateFinder
from mlxmm import Callback, DataModule
from mlxmm.errors import UserError


class ConstantRate(TinyRegression):
    def configure_optimizers(self):
        return optim.SGD(1e-4)


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.seen.append(trainer.optimizer.learning_rate.item())


class Rows(DataModule):
    """Rows of a wide regression, in batches of a size that can be set."""

    def __init__(self, num_rows=64, batch_size=4):
        rng = np.random.default_rng(0)
        self.batch_size, self.num_rows = batch_size, num_rows
        self.x, self.y = (rng.normal(size=shape).astype(np.float32) for shape in ((num_rows, 4), (num_rows,)))

    def train_dataloader(self):
        starts = range(0, self.num_rows, self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        return [{"x": self.x[p], "y": self.y[p], "mask": np.ones_like(self.y[p])} for p in parts]


class Wide(TinyRegression):
    """Takes 256 KiB of activations, or a few times that, for each row."""

    def training_step(self, batch):
        tall = mx.broadcast_to(batch["x"][:, :1], (len(batch["x"]), 1 << 16))
        return super().training_step(batch) | {"size": mx.sort(tall * self.head.bias[0], axis=1).mean()}


def weights(module):
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def random_numbers():
    return mx.random.state[0].tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_checkpointing": True}])
def test_a_run_after_the_search_is_the_run_without_it_to_the_bit(make_trainer, tmp_path, settings):
    searched, alone, before, after = TinyRegression(), TinyRegression(), [], []

    class Around(Callback):
        def __init__(self, states):
            self.states = states

        def on_fit_start(self, trainer, module):
            self.states.append(
                (random_numbers(), trainer.global_step, trainer.batch_idx, trainer.num_compiled_variants)
            )

        @property
        def state_key(self):
            return str(id(self))

    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    callbacks = [Around(before), finder, Around(after)]
    make_trainer(max_steps=8, callbacks=callbacks, **settings).fit(searched, train_dataloaders=DistinctBatches())
    make_trainer(max_steps=8, **settings).fit(alone, train_dataloaders=DistinctBatches())
    assert_same(weights(searched), weights(alone))
    assert before == after and len(finder.results["lr"]) == 20
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_rates_rise_from_least_to_most_and_each_is_the_rate_of_its_update(make_trainer, mode):
    finder = LearningRateFinder(1e-4, 1e-1, 4, mode)
    make_trainer(max_steps=1, callbacks=[finder]).fit(ConstantRate(dropout=0.0), train_dataloaders=DistinctBatches(1))
    expected = {"exponential": [1e-4, 1e-3, 1e-2, 1e-1], "linear": [1e-4, 0.0334, 0.0667, 0.1]}[mode]
    assert finder.results["lr"] == pytest.approx(expected, rel=1e-3)

    module, batch = ConstantRate(dropout=0.0), {k: mx.array(v) for k, v in DistinctBatches(1).batches[0].items()}
    losses, mean = [], 0.0
    for number, rate in enumerate(expected):
        outputs, grads = nn.value_and_grad(module, lambda: module.training_step(batch)["loss"])()
        optim.SGD(rate).update(module, optim.clip_grad_norm(grads, 1.0)[0])
        mean = 0.98 * mean + 0.02 * outputs.item()
        losses.append(mean / (1 - 0.98 ** (number + 1)))
    assert finder.results["loss"] == pytest.approx(losses, rel=1e-4)


def test_the_search_ends_where_the_loss_diverges_and_suggests_a_rate_below(make_trainer):
    finder = LearningRateFinder(1e-5, 1e4, 80)
    trainer = make_trainer(max_steps=1, callbacks=[finder], gradient_clip_val=None)
    trainer.fit(ConstantRate(dropout=0.0), train_dataloaders=DistinctBatches(1))
    assert 15 < len(finder.results["lr"]) < 80
    assert 1e-4 < finder.suggestion < finder.results["lr"][-1] / 2
    lowest = int(np.argmin(finder.results["loss"]))
    assert finder.suggestion <= finder.results["lr"][lowest]


def test_the_suggestion_is_where_the_loss_falls_most():
    from callbacks.learning_rate_finder import steepest

    loss = [9.0] * 10 + [5.0, 4.9, 4.0, 2.0, 1.5, np.nan, 9.0]
    assert steepest([float(i) for i in range(17)], loss) == 12.0
    assert steepest([1.0] * 12, [1.0] * 12) is None


@pytest.mark.parametrize("kind", [ConstantRate, TinyRegression])
def test_the_optimizer_keeps_its_rate_unless_asked_and_then_also_after_a_resume(make_trainer, tmp_path, kind):
    def fit(max_steps, ckpt_path=None, **settings):
        finder, rates = LearningRateFinder(1e-5, 1.0, 40, **settings), Rates()
        trainer = make_trainer(max_steps=max_steps, callbacks=[finder, rates], limit_train_batches=6)
        module = kind()
        trainer.fit(module, train_dataloaders=DistinctBatches(), ckpt_path=ckpt_path)
        assert bool(finder.results) == (ckpt_path is None)
        trainer.save_checkpoint(tmp_path / str(max_steps))
        return finder.suggestion, rates.seen, weights(module)

    own = Rates()
    make_trainer(max_steps=12, callbacks=[own]).fit(kind(), train_dataloaders=DistinctBatches())
    _, rates, _ = fit(12)
    assert rates == own.seen
    suggestion, rates, whole = fit(12, update_optimizer=True)
    shape = np.array(own.seen) / max(own.seen)
    assert rates == pytest.approx(shape * suggestion, rel=1e-5) and suggestion != pytest.approx(max(own.seen), rel=0.01)

    fit(5, update_optimizer=True)
    again, rest, _ = fit(12, tmp_path / "5", update_optimizer=True)
    assert again == suggestion and rest == rates[5:]


def test_a_search_that_raises_puts_everything_back_and_leaves_no_file(make_trainer, tmp_path):
    class Fails(Rows):
        def train_dataloader(self):
            good = super().train_dataloader()
            return [*good[:3], {"x": good[3]["x"]}]

    for finder in (LearningRateFinder(num_training_steps=8), BatchSizeFinder(10**9, steps_per_trial=8)):
        module, data = TinyRegression(), Fails(num_rows=16)
        before, numbers = weights(module), random_numbers()
        with pytest.raises(KeyError):
            make_trainer(max_steps=3, callbacks=[finder]).fit(module, data)
        assert_same(before, weights(module))
        assert random_numbers() == numbers and data.batch_size == 4 and not list(tmp_path.iterdir())


def test_data_that_can_be_read_once_are_not_spent(make_trainer):
    data = iter(DistinctBatches().batches)
    with pytest.raises(UserError, match="only once"):
        make_trainer(max_steps=3, callbacks=[LearningRateFinder()]).fit(TinyRegression(), train_dataloaders=data)
    assert len(list(data)) == 6


@pytest.mark.parametrize(("mode", "init_val", "size"), [("power", 2, 8), ("power", 64, 8), ("binsearch", 2, 11)])
def test_the_largest_batch_within_the_memory_limit_is_found_and_set(make_trainer, tmp_path, mode, init_val, size):
    data, seen = Rows(), []

    class Sizes(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            seen.append(len(batches[0]["x"]))

    mx.clear_cache()
    limit = mx.get_active_memory() + peak_of(make_trainer, 11)
    finder = BatchSizeFinder(limit, mode, init_val=init_val, steps_per_trial=1)
    trainer = make_trainer(max_steps=1, callbacks=[finder, Sizes()])
    trainer.fit(Wide(), data)
    assert (finder.batch_size, data.batch_size, seen) == (size, size, [size])
    assert not list(tmp_path.iterdir())


def peak_of(make_trainer, batch_size):
    """Bytes that an update takes above what is there, and half a row's."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    make_trainer(max_steps=1).fit(Wide(), Rows(batch_size=batch_size))
    return mx.get_peak_memory() - before + (1 << 17)


def test_a_run_after_the_search_is_the_run_with_that_size(make_trainer):
    searched, alone = TinyRegression(), TinyRegression()
    trainer = make_trainer(max_epochs=2, callbacks=[BatchSizeFinder(10**10)])
    trainer.fit(searched, Rows(num_rows=70))
    make_trainer(max_epochs=2).fit(alone, Rows(num_rows=70, batch_size=64))  # 128 cannot be filled
    assert_same(weights(searched), weights(alone))
    assert trainer.global_step == 4


def test_the_schedule_follows_the_number_of_updates_that_the_found_size_gives(make_trainer):
    class Scheduled(TinyRegression):
        def configure_optimizers(self):
            self.num_updates = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Scheduled()
    make_trainer(max_epochs=3, callbacks=[BatchSizeFinder(10**10)]).fit(module, Rows())
    assert module.num_updates == 3


def test_an_allocation_that_is_refused_counts_as_too_much_and_other_errors_do_not(make_trainer):
    class Refuses(TinyRegression):
        def training_step(self, batch):
            if len(batch["x"]) > 16:
                raise RuntimeError(self.message)
            return super().training_step(batch)

    module, finder = Refuses(), BatchSizeFinder(10**10)
    module.message = "[metal::malloc] Resource limit (499000) exceeded."
    make_trainer(max_steps=1, callbacks=[finder]).fit(module, Rows())
    assert finder.batch_size == 16
    module.message = "[matmul] shapes do not fit"
    with pytest.raises(RuntimeError, match="matmul"):
        make_trainer(max_steps=1, callbacks=[BatchSizeFinder(10**10)]).fit(module, Rows())


def test_no_size_that_fits_and_no_such_attribute_are_one_clear_error(make_trainer):
    with pytest.raises(UserError, match="memory_limit=1 "):
        make_trainer(max_steps=1, callbacks=[BatchSizeFinder(1)]).fit(TinyRegression(), Rows())
    with pytest.raises(UserError, match="no 'size'"):
        make_trainer(max_steps=1, callbacks=[BatchSizeFinder(1, attribute="size")]).fit(TinyRegression(), Rows())


@pytest.mark.filterwarnings("ignore:list cannot start")
def test_the_size_of_a_frozen_config_is_set_and_found_again_by_a_resumed_run(make_trainer, tmp_path):
    @attrs.frozen
    class Settings:
        batch_size: int = 4

    class Configured(Rows):
        config = Settings()

        def train_dataloader(self):
            self.batch_size = self.config.batch_size
            return super().train_dataloader()

    def fit(max_steps, ckpt_path=None):
        module, data = TinyRegression(), Configured()
        finder = BatchSizeFinder(10**10, max_trials=3, attribute="config.batch_size")
        trainer = make_trainer(max_steps=max_steps, callbacks=[finder])
        trainer.fit(module, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / str(max_steps))
        return data.config.batch_size, weights(module)

    size, whole = fit(7)
    fit(3)
    found, resumed = fit(7, tmp_path / "3")
    assert size == found == 8
    assert_same(whole, resumed)
