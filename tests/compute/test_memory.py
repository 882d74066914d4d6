"""Memory: limits act while a stage runs, freed memory is given back, and a high peak is told once."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback
from mlxmm.compute import memory

MIB = 2**20


class Records(Callback):
    """The bytes that MLX keeps of freed arrays: in training, and after validation."""

    def __init__(self):
        self.limits, self.kept = [], []

    def on_train_batch_end(self, trainer, module, metrics, batches):
        limit = mx.set_cache_limit(0)
        mx.set_cache_limit(limit)
        self.limits.append(limit)

    def on_validation_end(self, trainer, module, metrics):
        mx.eval(mx.zeros((256, 1_024)) + 1)

    def on_save_point(self, trainer, module):
        self.kept.append(mx.get_cache_memory())


def test_a_cache_limit_acts_while_a_stage_runs_and_no_longer(make_trainer):
    before, records = mx.set_cache_limit(7 * MIB), Records()
    try:
        trainer = make_trainer(max_steps=2, cache_limit_gib=3 / 1_024, callbacks=[records])
        trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
        assert records.limits == [3 * MIB] * 2 and mx.set_cache_limit(7 * MIB) == 7 * MIB

        class Fails(TinyRegression):
            def training_step(self, batch):
                raise RuntimeError("in the step")

        with pytest.raises(RuntimeError, match="in the step"):
            make_trainer(max_steps=2, cache_limit_gib=3 / 1_024).fit(Fails(), train_dataloaders=DistinctBatches())
        assert mx.set_cache_limit(7 * MIB) == 7 * MIB
    finally:
        mx.set_cache_limit(before)


def test_without_a_limit_a_cpu_keeps_that_of_mlx(make_trainer):
    before, records = mx.set_cache_limit(7 * MIB), Records()
    try:
        make_trainer(max_steps=1, callbacks=[records]).fit(TinyRegression(), train_dataloaders=DistinctBatches())
        assert records.limits == [7 * MIB]
    finally:
        mx.set_cache_limit(before)


@pytest.mark.skipif(mx.cuda.is_available(), reason="CUDA frees an array once its stream is through")
def test_memory_is_given_back_after_validation(make_trainer):
    records = Records()
    trainer = make_trainer(max_steps=1, callbacks=[records])
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(1), val_dataloaders=DistinctBatches(1))
    assert records.kept[0] < 4_096  # of a MiB that the callback freed before


def test_a_peak_near_the_working_set_is_told_once_with_what_to_do(make_trainer, monkeypatch):
    def fit(limit):
        monkeypatch.setattr(memory, "working_set", lambda: limit)
        mx.reset_peak_memory()
        held = mx.array(np.zeros(MIB, dtype=np.uint8))
        trainer = make_trainer(max_steps=6, log_every_n_steps=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
        del held
        return [str(warning.message) for warning in caught if "peak of memory" in str(warning.message)]

    [message] = fit(mx.get_active_memory() + MIB)
    assert "--batch-size" in message and "--trainer.gradient-checkpointing" in message
    assert fit(2**40) == fit(None) == []
