"""CachedFeatures: features of a frozen tower are computed once, and read from disk from then on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
from mlx.utils import tree_flatten

from mlxmm.config import checked
from mlxmm.data.feature_cache import FeatureRows, cache_key, cached_features
from mlxmm.data.sources.rows import Rows, is_stream
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import DECODER
from mlxmm.storage.cache import cache_folder
from mlxmm.training.callback import Callback
from mlxmm.training.module import evaluating
from mlxmm.training.trace import TraceSnapshot


@attrs.define(field_transformer=checked)
class CachedFeatures(Callback):
    """Trains and validates a captioner on features of its frozen tower that are kept on disk, in `folder`.

    Features are float16. They are found again by the tower's weights, the preprocessing, the layer and the images:
    where one of these changes, so does the cache. Rows that another callback replaces (`SyntheticRefresh`) get
    features of their own. From the epoch on in which the tower is unfrozen, images are read again; to unfreeze it
    within an epoch raises `UserError`. Needs a `CaptionData`.
    """

    reads_rows = True

    folder: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    splits: Sequence[str] = ("train", "val")
    tower: str = attrs.field(default="vision", kw_only=True)
    _cached: dict[str, FeatureRows] = attrs.field(factory=dict, init=False)  # of the splits that have features now
    _traced: TraceSnapshot | None = attrs.field(default=None, init=False)  # of the tower that computed them

    def setup(self, trainer, module, stage):
        if self.tower not in module or not hasattr(trainer.datamodule, "replace_rows"):
            raise UserError(f"CachedFeatures needs a captioner with a part {self.tower!r}, and a CaptionData")
        self._cached, self._traced = {}, None
        if self.folder is None:
            self.folder = cache_folder("features")

    def on_train_epoch_start(self, trainer, module):
        if tree_flatten(module[self.tower].trainable_parameters()):
            self._restore_images(trainer.datamodule)
            return
        self._check_data(trainer.datamodule)
        for split in self.splits:
            rows = trainer.datamodule.rows[split]
            if rows is not self._cached.get(split):
                self._cached[split] = FeatureRows(rows, self._features(module, rows, trainer.datamodule))
                trainer.datamodule.replace_rows(split, self._cached[split])
        self._traced = TraceSnapshot(module[self.tower])

    def on_train_batch_start(self, trainer, module, batches):
        if self._traced is not None and self._traced.changed():
            raise UserError(
                f"{self.tower} was unfrozen within an epoch whose features are cached: unfreeze it between epochs"
            )

    def on_train_end(self, trainer, module):
        self._restore_images(trainer.datamodule)

    def on_exception(self, trainer, module, exception):
        self._restore_images(trainer.datamodule)

    def _check_data(self, datamodule) -> None:
        if datamodule.source.config.random_crop:
            raise UserError("random_crop shows other pixels in every epoch, which cannot be cached: turn one off")
        if any(is_stream(datamodule.rows[split]) for split in self.splits):
            raise UserError("features of a stream cannot be cached, as its rows have no numbers: turn one off")

    def _restore_images(self, datamodule) -> None:
        for split, rows in self._cached.items():
            if datamodule.rows[split] is rows:  # not if another callback has replaced them since
                datamodule.replace_rows(split, rows.rows)
        self._cached, self._traced = {}, None

    def _features(self, module, rows: Rows, datamodule) -> np.ndarray:
        weights = hashlib.sha256()
        for name, array in sorted(tree_flatten(module[self.tower].parameters())):
            weights.update(name.encode() + np.array(array).tobytes())
        settings = module.feature_settings() | {"decoder": DECODER}
        key = cache_key(weights=weights.digest(), pictures=rows.fingerprint(), settings=settings)
        compute = lambda pixels: module.features(module.processor.normalize(pixels))
        with evaluating(module):
            num_threads = datamodule.source.config.num_decoding_threads
            return cached_features(
                self.folder / key, rows, module.processor.pixels_of, compute, num_threads=num_threads
            )
