"""LossSpikeGuard: what it undoes, what it stops, and that it is silent otherwise."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from callbacks import FreezeSchedule, LossSpikeError, LossSpikeGuard, ModelCheckpoint
from mlxmm import Callback, JSONLLogger


class PoisonedBatches(DistinctBatches):
    """The batches at some places of an epoch have targets of another size; by default they are not numbers."""

    def __init__(self, *places, factor=np.nan, num_batches=6):
        super().__init__(num_batches)
        self.places, self.factor = places, np.float32(factor)

    def epoch(self, epoch, start=0):
        for place, batch in enumerate(super().epoch(epoch)):
            if place >= start:
                yield batch | {"y": batch["y"] * self.factor} if place in self.places else batch


class Record(Callback):
    """All arrays of module and optimizer as they are at each save point, by number of updates."""

    def __init__(self):
        self.seen = {}

    def on_train_start(self, trainer, module):
        self.on_save_point(trainer, module)

    def on_save_point(self, trainer, module):
        moments = [(k, v) for k, v in tree_flatten(trainer.optimizer.state) if k not in ("step", "learning_rate")]
        arrays = [(f"module.{k}", v) for k, v in tree_flatten(module.parameters())] + moments
        self.seen[trainer.global_step] = {name: np.array(array) for name, array in arrays}
        self.count = trainer.optimizer.step.item()


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("settings", [{}, {"compile": False}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("place", [0, 4])
def test_an_update_that_is_not_finite_leaves_weights_and_moments_to_the_bit_and_counts(make_trainer, settings, place):
    guard, record = LossSpikeGuard(), Record()
    trainer = make_trainer(max_epochs=1, callbacks=[guard, record], **settings)
    trainer.fit(TinyRegression(), train_dataloaders=PoisonedBatches(place))
    bad = place // trainer.accumulate_grad_batches
    assert_same(record.seen[bad], record.seen[bad + 1])
    heads = [record.seen[step]["module.head.weight"] for step in range(trainer.global_step + 1)]
    assert [i for i, pair in enumerate(zip(heads, heads[1:])) if np.array_equal(*pair)] == [bad]
    assert all(np.isfinite(array).all() for array in record.seen[trainer.global_step].values())
    assert guard.num_skipped == 1 and record.count == trainer.global_step == 6 // trainer.accumulate_grad_batches


def test_a_spike_is_skipped_and_kept_out_of_the_mean_and_a_smaller_rise_is_not(make_trainer):
    for factor, num_skipped in ((30, 1), (1.2, 0)):
        guard = LossSpikeGuard(window=3)
        trainer = make_trainer(max_epochs=1, callbacks=[guard])
        trainer.fit(TinyRegression(), train_dataloaders=PoisonedBatches(4, factor=factor))
        assert guard.num_skipped == num_skipped and max(guard.losses) < 20


def test_a_gradient_that_is_not_finite_is_skipped_where_the_loss_is_finite(make_trainer):
    class RootOfZero(TinyRegression):
        def training_step(self, batch):
            outputs = super().training_step(batch)
            return outputs | {"loss": outputs["loss"] + mx.sqrt(0 * self.head.bias).sum()}

    guard, record = LossSpikeGuard(max_skips=5), Record()
    make_trainer(max_steps=2, callbacks=[guard, record]).fit(RootOfZero(), train_dataloaders=DistinctBatches())
    assert guard.num_skipped == 2
    assert_same(record.seen[0], record.seen[2])


@pytest.mark.parametrize(("settings", "stops_at"), [({"action": "stop"}, 3), ({"max_skips": 2}, 4)])
def test_stopping_names_update_and_loss_and_leaves_the_weights_of_before(make_trainer, settings, stops_at):
    module, record = TinyRegression(), Record()
    trainer = make_trainer(max_epochs=1, callbacks=[LossSpikeGuard(**settings), record])
    with pytest.raises(LossSpikeError, match=f"update {stops_at}: the loss is nan") as caught:
        trainer.fit(module, train_dataloaders=PoisonedBatches(2, 3))
    assert "in a row" in str(caught.value) if "max_skips" in settings else "in a row" not in str(caught.value)
    np.testing.assert_array_equal(np.array(module.head.weight), record.seen[2]["module.head.weight"])


def test_skips_that_are_not_in_a_row_do_not_stop(make_trainer):
    guard = LossSpikeGuard(max_skips=2)
    make_trainer(max_epochs=2, callbacks=[guard]).fit(TinyRegression(), train_dataloaders=PoisonedBatches(1, 3))
    assert guard.num_skipped == 4


def test_guarding_changes_no_bit_of_a_run_without_spikes(make_trainer):
    guarded, alone = TinyRegression(), TinyRegression()
    make_trainer(max_steps=9, callbacks=[LossSpikeGuard(rtol=None)]).fit(guarded, train_dataloaders=DistinctBatches())
    make_trainer(max_steps=9).fit(alone, train_dataloaders=DistinctBatches())
    assert_same(dict(tree_flatten(guarded.parameters())), dict(tree_flatten(alone.parameters())))


def test_a_layer_opened_at_the_very_update_that_is_skipped_starts_from_zero_moments(make_trainer):
    schedule, record = FreezeSchedule({0: "head", 3: ("head", "backbone")}, unit="step"), Record()
    trainer = make_trainer(max_steps=4, callbacks=[schedule, LossSpikeGuard(), record])
    trainer.fit(TinyRegression(), train_dataloaders=PoisonedBatches(3))
    assert not record.seen[4]["backbone.weight.m"].any() and record.seen[4]["head.weight.m"].any()


def test_counts_and_means_survive_a_resume_and_are_logged(make_trainer, tmp_path):
    def fit(folder, *others, ckpt_path=None):
        guard = LossSpikeGuard(window=9)
        save = ModelCheckpoint(every_n_train_steps=4, dirpath=folder / "c")
        trainer = make_trainer(max_epochs=2, logger=JSONLLogger(folder), callbacks=[guard, *others, save])
        module = TinyRegression()
        data = PoisonedBatches(2, 5)
        try:
            trainer.fit(module, train_dataloaders=data, ckpt_path=ckpt_path)
        except InterruptedError:
            pass
        return guard, dict(tree_flatten(module.parameters()))

    class Die(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            if trainer.global_step == 5:
                raise InterruptedError

    whole, weights = fit(tmp_path / "whole")
    fit(tmp_path / "parts", Die())
    guard, resumed = fit(tmp_path / "parts", ckpt_path=tmp_path / "parts/c/last")
    assert whole.state_dict() == guard.state_dict() and guard.num_skipped == 4 and len(guard.losses) == 8
    assert_same(weights, resumed)
    rows = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    told = {row["step"]: row["skipped_updates"] for row in rows if "skipped_updates" in row}
    assert told == {3: 1, 6: 2, 9: 3, 12: 4}
