"""A small module has one BLAS thread while it is trained or asked; a large one has those that there were."""

import mlx.nn as nn
import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback
from mlxmm.compute import linux_blas
from mlxmm.training.module import evaluating

pytestmark = pytest.mark.skipif(linux_blas.num_threads() is None, reason="MLX has a BLAS of its own here")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before = linux_blas.num_threads()
    linux_blas.set_num_threads(2)
    yield
    linux_blas.set_num_threads(before)


@pytest.mark.parametrize(("width", "num_threads"), [(64, 1), (1_500, 2)])  # 1,500 squared is more than 2,000,000
def test_a_small_module_is_asked_with_one_thread(width, num_threads):
    with evaluating(nn.Linear(width, width)):
        assert linux_blas.num_threads() == num_threads
    assert linux_blas.num_threads() == 2


def test_a_small_module_is_trained_with_one_thread(make_trainer):
    class Seen(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            self.num_threads = linux_blas.num_threads()

    seen = Seen()
    make_trainer(max_steps=1, callbacks=[seen]).fit(TinyRegression(), DistinctBatches())
    assert seen.num_threads == 1 and linux_blas.num_threads() == 2


def test_a_number_that_is_set_stays(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    with evaluating(nn.Linear(2, 2)):
        assert linux_blas.num_threads() == 2
