"""DataModule: where a Trainer's batches come from."""

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from mlxmm.errors import UserError
from mlxmm.training import lightning_arguments, lightning_words, unknown_names
from mlxmm.training.batches import has_epochs
from mlxmm.training.loader_randomness import OwnRandomState

AGAIN = "give a list, or an object whose __iter__ begins again"


class DataModule:
    """Provides the loaders of all stages: Lightning's `LightningDataModule`. A missing loader is None."""

    trainer: Any = None  # the Trainer whose stage it serves; `trainer.module` is the module

    def __getattr__(self, name: str):
        """For names of Lightning's, what to write instead."""
        if name in lightning_words.DATAMODULE:
            raise unknown_names.missing(type(self).__name__, name, lightning_words.DATAMODULE)
        return super().__getattribute__(name)

    @property
    def hparams(self) -> dict:
        """The settings that loggers write: those of `config`, if the data have one."""
        return lightning_arguments.settings_of(self)

    def __getstate__(self) -> dict:
        """What copies and pickles have: not the trainer, which is not theirs."""
        return {name: value for name, value in vars(self).items() if name != "trainer"}

    def prepare_data(self) -> None:
        """Download and unpack, on one process, before `setup`."""

    def setup(self, stage: str) -> None:
        """Open the data for "fit", "validate", "test" or "predict". Called before each stage: open only once."""

    def teardown(self, stage: str) -> None:
        """Close what `setup` opened, after a stage that ended without an exception."""

    def state_dict(self) -> dict:
        """JSON values that a checkpoint keeps: what a resumed run must find the same, for example."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave, before anything else of the checkpoint is loaded; it may be empty."""

    def train_dataloader(self):
        """Called at the start of every epoch."""

    def val_dataloader(self):
        """Called at every validation."""

    def test_dataloader(self):
        """Called at every test."""

    def predict_dataloader(self):
        """Called at every prediction."""


@attrs.define(slots=False)
class Loaders(DataModule):
    """Loaders that were given to the Trainer one by one, as a DataModule. Raises `UserError` for what is no loader."""

    train: Iterable | None = None
    val: Iterable | None = None
    test: Iterable | None = None
    predict: Iterable | None = None

    def __attrs_post_init__(self):
        for stage, loader in attrs.asdict(self, recurse=False).items():
            _check_loader(stage, loader)
        if self.train is not None and is_spent_once(self.val):
            raise UserError(f"the val data are a {type(self.val).__name__}, which is read once: {AGAIN}")

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val

    def test_dataloader(self):
        return self.test

    def predict_dataloader(self):
        return self.predict


def as_datamodule(datamodule: DataModule | None, **loaders) -> DataModule:
    """The data of a stage. A DataModule may also be in the place of the first loader, as in Lightning.

    Raises `UserError` where both are given.
    """
    first, *others = loaders.values()
    if datamodule is None and not any(other is not None for other in others) and _is_datamodule(first):
        return first
    if datamodule is None:
        return Loaders(**loaders)
    if any(loader is not None for loader in loaders.values()):
        raise UserError("give a datamodule or loaders, not both")
    return datamodule


def stage_loader(datamodule: DataModule, stage: str):
    """The loader for "train", "val", "test" or "predict", or None. Raises `UserError` for what is no loader."""
    loader = getattr(datamodule, f"{stage}_dataloader")()
    _check_loader(stage, loader)
    return loader


def needed_loader(datamodule: DataModule, stage: str):
    """The `stage_loader` of a stage that is about to run. Raises `UserError` where there is none."""
    if (loader := stage_loader(datamodule, stage)) is None:
        raise UserError(f"there are no {stage} data: give dataloaders, or a datamodule with {stage}_dataloader")
    return loader


def train_loader(datamodule: DataModule, seed: int = 0):
    """The training loader, whose making draws from `seed`. Raises `UserError` where there is none."""
    with OwnRandomState(seed)():
        loader = stage_loader(datamodule, "train")
    if loader is None:
        raise UserError("there is no training data: give a datamodule or train_dataloaders")
    return loader


def is_spent_once(loader) -> bool:
    """Whether `loader` is an iterator, which cannot begin again: a generator, a `zip`."""
    return not has_epochs(loader) and hasattr(loader, "__next__")


def why_empty(loader, epoch: int) -> str:
    """What to say of training data that gave no batch."""
    again = is_spent_once(loader) and epoch > 0
    why = f"an iterator is read once, {AGAIN}" if again else "fewer examples than one batch holds?"
    return f"the training data gave no batch in epoch {epoch}: {why}"


def _is_datamodule(value) -> bool:
    return isinstance(value, DataModule) or hasattr(value, "train_dataloader")


def _check_loader(stage: str, loader) -> None:
    if isinstance(loader, Mapping):
        raise UserError(f"the {stage} data are a dict: a stage has one loader, which may draw from several data sets")
    if callable(loader) and not hasattr(loader, "__iter__"):
        raise UserError(
            f"the {stage} data are {getattr(loader, '__name__', loader)!r}: call it, and give what it returns"
        )
    if isinstance(loader, list | tuple) and any(map(_is_lone_loader, loader)):
        raise UserError(f"the {stage} data are a list of loaders: a stage has one, which may draw from several sets")
    is_loader = any(hasattr(loader, name) for name in ("epoch", "__iter__", "__getitem__"))
    if loader is not None and (not is_loader or isinstance(loader, str)):
        raise UserError(f"the {stage} data are {loader!r}: a loader is a list of batches, or another iterable of them")


def _is_lone_loader(value) -> bool:
    """Whether this is a loader and can be no batch."""
    is_batch = isinstance(value, Mapping | list | tuple | str) or hasattr(value, "dtype")
    return has_epochs(value) or (not is_batch and hasattr(value, "__iter__"))
