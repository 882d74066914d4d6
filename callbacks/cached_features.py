"""CachedFeatures: what a frozen tower sees is computed once, and read from disk from then on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
from mlx.utils import tree_flatten

from mlxmm.data.feature_cache import FeatureRows, cache_key, cached_features
from mlxmm.data.sources.stream import StreamRows
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.storage.cache import cache_folder
from mlxmm.training.callback import Callback
from mlxmm.training.module import evaluating
from mlxmm.training.trainable import TraceSnapshot


@attrs.define
class CachedFeatures(Callback):
    """Trains and validates a captioner on features of its frozen tower that are kept in `folder`.

    What was kept is found again by the tower's weights, the preprocessing, the layer and the pictures; where one of
    these is another, so is the cache. Features are float16. From the epoch on in which the tower is opened, pictures
    are read again; to open it within an epoch is an error. Needs a datamodule with `rows`, as CaptionData is.
    """

    folder: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    splits: Sequence[str] = ("train", "val")
    tower: str = attrs.field(default="vision", kw_only=True)
    _pictures: dict[str, Sequence] = attrs.field(factory=dict, init=False)
    _modes: TraceSnapshot | None = attrs.field(default=None, init=False)  # of the tower that the features are of

    def setup(self, trainer, module, stage):
        self._pictures, self._modes = {}, None
        if self.folder is None:
            self.folder = cache_folder("features")

    def on_train_epoch_start(self, trainer, module):
        tower = module[self.tower]
        if tree_flatten(tower.trainable_parameters()):
            self._give_pictures_back(trainer.datamodule)
        elif self._modes is None:
            if trainer.datamodule.source.config.random_crop:
                raise UserError("random_crop shows other pixels in every epoch, which cannot be cached: turn one off")
            if any(isinstance(trainer.datamodule.rows[split], StreamRows) for split in self.splits):
                raise UserError("features of a stream cannot be cached, as its rows have no numbers: turn one off")
            self._pictures = {split: trainer.datamodule.rows[split] for split in self.splits}
            for split, rows in self._pictures.items():
                trainer.datamodule.replace_rows(
                    split, FeatureRows(rows, self._features(module, rows, trainer.datamodule))
                )
            self._modes = TraceSnapshot(tower)

    def on_train_batch_start(self, trainer, module, batches):
        if self._modes is not None and self._modes.changed():
            raise UserError(
                f"{self.tower} was opened within an epoch whose features are cached: open it between epochs"
            )

    def on_train_end(self, trainer, module):
        self._give_pictures_back(trainer.datamodule)

    def on_exception(self, trainer, module, exception):
        self._give_pictures_back(trainer.datamodule)

    def _give_pictures_back(self, datamodule) -> None:
        for split, rows in self._pictures.items():
            datamodule.replace_rows(split, rows)
        self._pictures, self._modes = {}, None

    def _features(self, module, rows: Sequence, datamodule) -> np.ndarray:
        weights = hashlib.sha256()
        for name, array in sorted(tree_flatten(module[self.tower].parameters())):
            weights.update(name.encode() + np.array(array).tobytes())
        key = cache_key(weights=weights.digest(), pictures=rows.fingerprint(), settings=module.feature_settings())
        pixels = lambda row: module.processor.pixels(row["image"])
        compute = lambda pixels: module.features(module.processor.normalize(pixels))
        num_threads = datamodule.source.config.num_threads
        with evaluating(module):
            if collectives.rank() == 0:
                cached_features(self.folder / key, rows, pixels, compute, num_threads=num_threads)
            collectives.barrier()
            return cached_features(self.folder / key, rows, pixels, compute)
