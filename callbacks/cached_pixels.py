"""CachedPixels: pictures are decoded and resized once, and their pixels are read from disk from then on."""

from collections.abc import Sequence
from pathlib import Path

import attrs
from attrs.validators import ge

from mlxmm.config import checked
from mlxmm.data.cached_rows import CachedRows
from mlxmm.data.feature_cache import cache_key
from mlxmm.data.pixel_cache import SUFFIX, PixelFile, PixelRows, make_room, num_bytes
from mlxmm.data.sources.rows import Rows, is_stream
from mlxmm.data.sources.tables import tell
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import DECODER
from mlxmm.storage.cache import cache_folder
from mlxmm.storage.disk import reason
from mlxmm.training.callback import Callback

from .cached_features import CachedFeatures


@attrs.define(field_transformer=checked)
class CachedPixels(Callback):
    """Keeps the pixels of pictures on disk, in `folder`, when they are first read: the same bytes as without.

    They are found again by the pictures and the preprocessing: where one of these changes, so does the file. Files take
    `max_gib` at most (0: nothing is kept), so those opened longest ago are deleted. Pixels that would take more, or
    more than half of what the disk has free, are not kept, which a line says. Not kept either are those of training
    with `random_crop`, of streams, of `fast_dev_run`, and of pictures that another callback draws or adds
    (`SyntheticRefresh`).
    `CachedFeatures` comes before this, or `UserError` is raised.

    Needs a `CaptionData`, a module with a `processor`, and a transform that takes the pixels of a row by
    `processor.pixels_of(row)`.
    """

    reads_rows = True

    folder: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    splits: Sequence[str] = ("train", "val")
    max_gib: float = attrs.field(default=8.0, validator=ge(0), kw_only=True)
    _cached: dict[str, PixelRows] = attrs.field(factory=dict, init=False)  # of the splits that have pixels now
    _has_failed: bool = attrs.field(default=False, init=False)

    def setup(self, trainer, module, stage):
        if not hasattr(module, "processor") or not hasattr(trainer.datamodule, "replace_rows"):
            raise UserError("CachedPixels needs a module with a processor, and a CaptionData")
        later = trainer.callbacks[trainer.callbacks.index(self) :]
        if any(isinstance(one, CachedFeatures) for one in later):  # each gives back the rows that it has replaced
            raise UserError("CachedFeatures comes before CachedPixels: write them in this order")
        self._cached, self._has_failed = {}, False
        if self.folder is None:
            self.folder = cache_folder("pixels")

    def on_train_epoch_start(self, trainer, module):
        rows = {split: trainer.datamodule.rows[split] for split in self.splits}
        rows = {split: own for split, own in rows.items() if _can_be_kept(trainer.datamodule, split, own)}
        if not rows or not self.max_gib or self._has_failed or trainer.config.fast_dev_run:
            return
        try:
            files = self._open(rows, module.processor)
        except OSError as error:
            self._has_failed = True
            tell(f"pixels are not kept, each epoch decodes its pictures: {reason(error)}")
            return
        for split, file in files.items():
            self._cached[split] = PixelRows(rows[split], module.processor.pixels_of, file)
            trainer.datamodule.replace_rows(split, self._cached[split])

    def on_train_end(self, trainer, module):
        self._restore_images(trainer.datamodule)

    def on_exception(self, trainer, module, exception):
        self._restore_images(trainer.datamodule)

    def _open(self, rows: dict[str, Rows], processor) -> dict[str, PixelFile]:
        """The file of each split. Raises `OSError` where the disk has no room."""
        settings, side = processor.to_hub() | {"decoder": DECODER}, processor.image_size
        key = lambda own: cache_key(pictures=own.fingerprint(), settings=settings)
        names = {split: f"{key(own)}{SUFFIX}" for split, own in rows.items()}
        others = {cached.file.path.name: num_bytes(len(cached), side) for cached in self._cached.values()}
        needed = others | {names[split]: num_bytes(len(own), side) for split, own in rows.items()}
        make_room(self.folder, needed, round(self.max_gib * 2**30))
        return {split: PixelFile(self.folder / name, side) for split, name in names.items()}

    def _restore_images(self, datamodule) -> None:
        for split, rows in self._cached.items():
            if datamodule.rows[split] is rows:  # not if another callback has replaced them since
                datamodule.replace_rows(split, rows.rows)
        self._cached = {}


def _can_be_kept(datamodule, split: str, rows) -> bool:
    """Whether each epoch reads the same pictures, as the source has them."""
    is_random = split == "train" and datamodule.source.config.random_crop
    if is_random or is_stream(rows) or isinstance(rows, CachedRows):
        return False
    return rows.fingerprint() == datamodule.source.rows[split].fingerprint()
