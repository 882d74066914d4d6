"""Module: a network, its loss and its optimizer, in one object that a Trainer fits."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn

from mlxmm.compute.precision import ComputeDtypes
from mlxmm.config import to_json
from mlxmm.storage.lineage import Lineage


class Module(nn.Module):
    """What a `Trainer` fits: Lightning's `LightningModule` on MLX.

    Steps take a batch, a tree of arrays, and return a dict of scalar means: "loss", other metrics, and where batches
    count differently their "weight" (examples, or supervised tokens). Steps are compiled: their Python code runs once
    per batch shape, so they return what they measure instead of logging it.

    Hooks of `Callback` may be methods of a module too, without `trainer` and `module`: `on_train_start(self)`.
    """

    trainer: Any = None  # the Trainer that fits this module
    lineage = Lineage()  # the data that this module was trained on, as far as it is known
    compute_dtypes = ComputeDtypes()  # see there; replaced as a whole, not changed

    @property
    def hparams(self) -> dict:
        """The settings that loggers write: those of `config`, if the module has one."""
        config = vars(self).get("config")
        return to_json(config) if attrs.has(type(config)) else {}

    def training_step(self, batch) -> dict[str, mx.array]:
        """The loss of one batch, and other metrics to log."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def validation_step(self, batch) -> dict[str, mx.array]:
        """The metrics of one validation batch; by default those of `training_step`."""
        return self.training_step(batch)

    def test_step(self, batch) -> dict[str, mx.array]:
        """The metrics of one test batch; by default those of `validation_step`."""
        return self.validation_step(batch)

    def predict_step(self, batch):
        """What `Trainer.predict` collects for one batch, of any type. Not compiled."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_step")

    def configure_callbacks(self) -> list:
        """Callbacks of the module; they replace the trainer's callbacks of the same class."""
        return []

    def configure_optimizers(self):
        """The `mlx.optimizers.Optimizer` of the parameters that are trainable now."""
        raise NotImplementedError(f"{type(self).__name__} has no configure_optimizers")

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names for groups of parameters (dotted names), for a `FreezeSchedule`: {"lora": [...]}."""
        return {}

    def after_update(self) -> None:
        """Constrain parameters: called inside the compiled update, after the optimizer."""

    def save_config(self, folder: Path) -> None:
        """Write into a checkpoint's folder what `from_pretrained` needs beside the weights."""


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode within the block; then restore the mode of each part."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part._training = mode  # `train(mode)` would set the parts below it too
