"""Module: a network, its loss and its optimizer, in one object that a Trainer fits."""

import abc
import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxmm.compute.cores import cores_for
from mlxmm.compute.named_arrays import is_differentiable, put_arrays
from mlxmm.compute.precision import ComputeDtypes
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.storage.atomic import follow_link
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.runs import model_of
from mlxmm.training import lightning_arguments, lightning_words, mlx_errors, unknown_names


class NotedErrors(abc.ABCMeta):
    """The class of modules: an error of MLX while one is made gets a note of what is meant."""

    def __call__(cls, *args, **kwargs):
        with mlx_errors.noted():
            return super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of `__init__`: `inspect` would show the one of `__call__`."""
        init = inspect.signature(cls.__init__)
        return init.replace(parameters=[*init.parameters.values()][1:])


class Module(nn.Module, metaclass=NotedErrors):
    """What a `Trainer` fits: Lightning's `LightningModule` on MLX.

    Steps take a batch, a tree of arrays, and return a dict of scalar means: "loss", other metrics, and where batches
    count differently their "weight" (examples, or supervised tokens). Steps are compiled: their Python code runs once
    per batch shape, so they return what they measure instead of logging it.

    Hooks of `Callback` may be methods of a module too, without `trainer` and `module`: `on_train_start(self)`.
    """

    trainer: Any = None  # the Trainer that fits this module
    lineage = Lineage()  # the data that this module was trained on, as far as it is known
    compute_dtypes = ComputeDtypes()  # see there; replaced as a whole, not changed

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in lightning_words.MODULE:
                raise
            raise unknown_names.missing(type(self).__name__, name, lightning_words.MODULE) from None

    def __getstate__(self) -> dict:
        """What copies and pickles have beside the parameters: not the trainer, which belongs to this module alone."""
        return {name: value for name, value in vars(self).items() if name != "trainer"}

    def __call__(self, *args, **kwargs):
        """Lightning's `forward`, for modules that name it so."""
        if not hasattr(self, "forward"):
            raise UserError(f"{type(self).__name__} is called, and has no __call__")
        return self.forward(*args, **kwargs)

    @staticmethod
    def trainable_parameter_filter(module, key, value) -> bool:
        """MLX's, which takes arrays of integers and booleans, such as position ids, for trainable."""
        return nn.Module.trainable_parameter_filter(module, key, value) and is_differentiable(value)

    def update(self, parameters: dict, strict: bool = True) -> "Module":
        """MLX's, also for frozen arrays in lists and dicts, and for dicts whose keys are digits or have dots."""
        put_arrays(self, parameters, strict)
        return self

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Path | str, *args, **kwargs):
        """A module with the weights of a checkpoint.

        It is what `from_pretrained` gives where the class has one; else it is made by `cls(*args, **kwargs)`: these
        arguments are not part of a checkpoint. Of a run's folder it is the best checkpoint, or else the last. Raises
        `UserError` if the arguments do not fit, or it is no checkpoint of this class.
        """
        kwargs = lightning_arguments.loading_arguments(f"{cls.__name__}.load_from_checkpoint", cls, kwargs)
        folder = follow_link(Path(model_of(checkpoint_path)))
        checkpoint.read_state(folder)
        if hasattr(cls, "from_pretrained") and not (args or kwargs):
            return cls.from_pretrained(folder)
        try:
            inspect.signature(cls).bind(*args, **kwargs)
        except TypeError as error:
            told = f"give the arguments of {cls.__name__} again, {error}"
            raise UserError(f"{cls.__name__}.load_from_checkpoint: {told}") from None
        module = cls(*args, **kwargs)
        checkpoint.load_weights(folder, module)
        return module

    @property
    def hparams(self) -> dict:
        """The settings that loggers write: those of `config`, if the module has one."""
        return lightning_arguments.settings_of(self)

    @hparams.setter
    def hparams(self, value) -> None:
        raise UserError(f"{type(self).__name__}.hparams: {lightning_words.SETTINGS}")

    @hparams.deleter
    def hparams(self) -> None:  # MLX's way to set a dict
        raise UserError(f"{type(self).__name__}.hparams: {lightning_words.SETTINGS}")

    def training_step(self, batch) -> dict[str, mx.array]:
        """The loss of one batch, and other metrics to log."""
        raise UserError(f"{type(self).__name__} has no training_step")

    def validation_step(self, batch) -> dict[str, mx.array]:
        """The metrics of one validation batch; by default those of `training_step`."""
        return self.training_step(batch)

    def test_step(self, batch) -> dict[str, mx.array]:
        """The metrics of one test batch; by default those of `validation_step`."""
        return self.validation_step(batch)

    def predict_step(self, batch):
        """What `Trainer.predict` collects for one batch, of any type. Not compiled."""
        raise UserError(f"{type(self).__name__} has no predict_step: write predict_step(self, batch)")

    def configure_callbacks(self) -> list:
        """Callbacks of the module; they replace the trainer's callbacks of the same class."""
        return []

    def configure_optimizers(self):
        """The `mlx.optimizers.Optimizer` of the parameters that are trainable now."""
        raise UserError(f"{type(self).__name__} has no configure_optimizers")

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names for groups of parameters (dotted names), for a `FreezeSchedule`: {"lora": [...]}."""
        return {}

    def after_update(self) -> None:
        """Constrain parameters: called inside the compiled update, after the optimizer."""

    def save_config(self, folder: Path) -> None:
        """Write into a checkpoint's folder what `from_pretrained` needs beside the weights."""


@contextlib.contextmanager
def evaluating(module: nn.Module, num_rows: int | None = None) -> Iterator[None]:
    """Put the module into evaluation mode within the block, to be asked about `num_rows` at once; then restore the mode
    of each part."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with cores_for(module, num_rows):
            yield
    finally:
        for part, mode in modes:
            part._training = mode  # `train(mode)` would set the parts below it too
