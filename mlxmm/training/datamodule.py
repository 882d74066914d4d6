"""DataModule: where a Trainer's batches come from."""

from collections.abc import Iterable

import attrs


class DataModule:
    """Where batches come from: Lightning's `LightningDataModule`. A missing loader is None."""

    def prepare_data(self) -> None:
        """Download and unpack: once, before anything else."""

    def setup(self, stage: str) -> None:
        """Open the data for "fit", "validate", "test" or "predict"; called before each, so do it once."""

    def teardown(self, stage: str) -> None:
        """Close what `setup` opened, after a stage that ended well."""

    def train_dataloader(self):
        """Asked for at the start of every epoch."""

    def val_dataloader(self):
        """Asked for at every validation."""

    def test_dataloader(self):
        """Asked for at every test."""

    def predict_dataloader(self):
        """Asked for at every prediction."""


@attrs.frozen
class Loaders:
    """Loaders handed to the Trainer one by one, in the shape of a DataModule."""

    train: Iterable | None = None
    val: Iterable | None = None
    test: Iterable | None = None
    predict: Iterable | None = None

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def teardown(self, stage: str) -> None: ...

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val

    def test_dataloader(self):
        return self.test

    def predict_dataloader(self):
        return self.predict
