"""What the tests share: tiny modules and data, and a cache of their own."""

import contextlib
import os
import resource
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On GPUs that have TF32, MLX rounds the factors of float32 products to 10 bits unless told not to: tests compare with
# NumPy and PyTorch to within 1e-5. MLX reads it once, when it is first needed.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxmm import Module, Trainer
from mlxmm.callbacks import ModelCheckpoint, TQDMProgressBar
from mlxmm.compute import cores, linux_blas
from mlxmm.optimizers import OptimizerConfig
from mlxmm.training.checks import as_callbacks


class TinyRegression(Module):
    """Two layers with dropout between them, and a weighted squared error."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        mx.random.seed(7)
        self.backbone, self.dropout, self.head = nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1)

    def training_step(self, batch):
        hidden = self.dropout(mx.maximum(self.backbone(batch["x"]), 0))
        errors = mx.square(self.head(hidden)[:, 0] - batch["y"]) * batch["mask"]
        weight = batch["mask"].sum()
        return {"loss": errors.sum() / weight, "weight": weight}

    def configure_optimizers(self):
        return OptimizerConfig(warmup_steps=2, learning_rate=0.05).build(30)


class DistinctBatches:
    """Loader of shuffled, distinct batches: their order is a function of the epoch."""

    def __init__(self, num_batches: int = 6, batch_size: int = 4):
        rng = np.random.default_rng(0)
        self.batches = [
            {
                "x": rng.normal(size=(batch_size, 4)).astype(np.float32),
                "y": rng.normal(size=batch_size).astype(np.float32),
                "mask": (rng.random(batch_size) < 0.7).astype(np.float32) + 0.1,
            }
            for _ in range(num_batches)
        ]

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, start=0):
        order = np.random.default_rng(epoch).permutation(len(self.batches))
        return (self.batches[i] for i in order[start:])


@pytest.fixture(scope="session", autouse=True)
def heard_signals():
    """pytest-xdist's workers ignore SIGINT, and what they start would ignore it too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    os.environ["MLXMM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_trainer(tmp_path):
    def make(**settings):
        given = as_callbacks(settings.get("callbacks"))
        defaults = {"logger": False, "default_root_dir": tmp_path, "enable_model_summary": False}
        defaults["enable_progress_bar"] = any(isinstance(callback, TQDMProgressBar) for callback in given)
        defaults["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in given)
        return Trainer(**defaults | settings)

    return make


@pytest.fixture
def full_disk():
    """A function that lets files grow to so many bytes; None: without bound."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1] if size is None else size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def blas_threads(count: int):
    """Within the block, the BLAS of a Linux CPU has so many threads, which are as many cores as MLX uses."""
    before = linux_blas.num_threads()
    linux_blas.set_num_threads(count)
    try:
        yield
    finally:
        if before is not None:
            linux_blas.set_num_threads(before)


def on_cores(count: int, compute):
    """What `compute()` returns, computed as a small module is on `count` cores of a Linux CPU."""
    with blas_threads(count), cores.cores_for(nn.Linear(2, 2)):
        found = compute()
        mx.eval(found)
    return found
