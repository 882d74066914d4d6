"""Module: a network, its loss and its optimizer, in one object that a Trainer fits."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import attrs
import mlx.core as mx
import mlx.nn as nn

from mlxmm.config import to_json


class Module(nn.Module):
    """What a `Trainer` fits: Lightning's `LightningModule` on MLX.

    Steps take a batch, a tree of arrays, and return a dict of scalar means with "loss" among them and, where
    examples count differently, their "weight" (examples, or supervised tokens). They are compiled: they run as
    Python once per batch shape, so they return what they measure and keep no record of their own.

    Any hook of `Callback` may be a method of a module too, without `trainer` and `module`: `on_train_start(self)`.
    """

    trainer = None  # the Trainer that fits this module, while it does

    @property
    def hparams(self) -> dict:
        """The settings that loggers write: those of `config`, where the module has one."""
        config = vars(self).get("config")
        return to_json(config) if attrs.has(type(config)) else {}

    def training_step(self, batch) -> dict[str, mx.array]:
        """The loss of one batch, and what else is worth a curve."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def validation_step(self, batch) -> dict[str, mx.array]:
        """What to measure on one validation batch; `training_step`, unless a module measures more."""
        return self.training_step(batch)

    def test_step(self, batch) -> dict[str, mx.array]:
        """What to measure on one test batch; `validation_step`, unless a module measures more."""
        return self.validation_step(batch)

    def predict_step(self, batch):
        """What `Trainer.predict` collects for one batch: anything. Not compiled."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_step")

    def configure_callbacks(self) -> list:
        """Callbacks of the module's own; they replace the trainer's of the same class."""
        return []

    def configure_optimizers(self):
        """The `mlx.optimizers.Optimizer` of the parameters that are trainable now."""
        raise NotImplementedError(f"{type(self).__name__} has no configure_optimizers")

    def parameter_groups(self) -> dict[str, list[str]]:
        """Parameters, by their dotted names, that a `FreezeSchedule` may name together: {"lora": [...]}."""
        return {}

    def after_update(self) -> None:
        """Keep parameters within bounds: called inside the compiled update, after the optimizer."""

    def save_config(self, folder: Path) -> None:
        """Write beside the weights of a checkpoint what `from_pretrained` needs to read them."""


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and afterwards back on exactly where it was on."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part._training = mode  # `train(mode)` would set the parts below it too
