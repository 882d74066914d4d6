"""DataModule: where a Trainer's batches come from."""

from collections.abc import Iterable

import attrs


class DataModule:
    """Provides the loaders of all stages: Lightning's `LightningDataModule`. A missing loader is None."""

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


@attrs.frozen
class Loaders:
    """Loaders that were given to the Trainer one by one, as a DataModule."""

    train: Iterable | None = None
    val: Iterable | None = None
    test: Iterable | None = None
    predict: Iterable | None = None

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def teardown(self, stage: str) -> None: ...

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
