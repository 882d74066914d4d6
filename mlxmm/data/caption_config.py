"""Which pictures and captions a run reads, and how they become batches: settings."""

import math
import os
from collections.abc import Iterable

import attrs
from attrs.validators import ge

from mlxmm.config import checked, option, section, texts
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.data.sources.where import Condition
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.storage.hub import is_hub_id, split_revision

MAX_THREADS = 8  # each holds a batch that it prepares
SHAPES = "shapes"  # the source that is drawn


def _paths(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Texts, in which ~ is the home folder."""
    return tuple(map(os.path.expanduser, texts(value)))


@attrs.frozen(kw_only=True, field_transformer=checked)
class BatchConfig:
    """How pictures with captions become batches, wherever they come from."""

    batch_size: int = option(64, "pictures in a batch of each process", ge(1), flag="--batch-size", first=True)
    num_threads: int = option(
        0, f"threads that decode pictures; 0: as many as this process has cores, at most {MAX_THREADS}", ge(0)
    )
    random_crop: bool = option(False, "train on a random square of each picture, not on its middle")
    pixel_cache_gib: float = option(
        8.0, "most disk for decoded pictures, which later epochs and runs read; 0: none", ge(0), rare=True
    )
    shuffle_buffer: int = option(1_000, "pictures of a stream that the next one is drawn from", ge(1), rare=True)

    @property
    def num_decoding_threads(self) -> int:
        """`num_threads`, or as many as this machine has for this process. What they make does not depend on it."""
        return self.num_threads or min(MAX_THREADS, collectives.cores_per_process())


@attrs.frozen(kw_only=True, field_transformer=checked)
class CaptionDataConfig(BatchConfig):
    """Which pictures and captions, and how they become batches. A lone `source` may be given as a string."""

    source: tuple[str, ...] = option(
        (SHAPES,),
        "`shapes` (drawn), files, a folder or a data set on the Hub (user/name@revision), as docs/your-own-data.md "
        "says; of several, all give training pictures, the first alone val and test",
        first=True,
        converter=_paths,
    )
    weights: tuple[float, ...] = option(
        (), "how often an epoch has each training row, by source; 0.5: a new half each time"
    )
    where: tuple[str, ...] = option((), "conditions on columns, as clip_score>=0.6: other rows are left out")
    revision: str | None = option(None, "commit, tag or branch of a data set on the Hub, if its id names none")
    config_name: tuple[str, ...] = option(
        (),
        "configuration of each source that has several; none: its default",
        converter=texts,
    )
    image_column: str = option("image", "column that holds the picture")
    caption_column: tuple[str, ...] = option(
        ("caption",),
        "column of captions; or several, caption_*, sentences.raw",
        converter=texts,
    )
    captions: tuple[str, ...] = option(
        (),
        "tables of captions of these pictures: parquet, jsonl, csv, json, a data set",
        converter=_paths,
    )
    image_folder: str | None = option(None, "folder of the pictures that a list names; none: the list's own", rare=True)
    split_column: str | None = option(None, "column with train, val, test; random: drawn; none: its own splits")
    streaming: bool = option(False, "train on pictures as they are read, without loading all of them first")
    held_out: int = option(
        1_000, "most pictures of a stream's val and test splits, which are kept in memory", ge(1), rare=True
    )
    shapes: ShapesConfig = section(ShapesConfig(), rare=True)

    def __attrs_post_init__(self):
        if not self.source:
            raise UserError("--data.source names nothing: name one source, or several")
        if self.streaming and SHAPES in self.source:
            raise UserError("streaming needs a source: `shapes` are drawn, not read")
        if self.captions and self.streaming:
            raise UserError("--data.captions is for pictures that are read once, not for a stream")
        self._check_mixture()
        self._check_weights()
        _ = self.conditions
        for source in self.source:
            if is_hub_id(source):
                split_revision(source, self.revision)  # two are refused as soon as the flags are read

    def _check_mixture(self) -> None:
        is_mixture, names = len(self.source) > 1, len(self.config_name)
        if self.streaming and (is_mixture or self.weights):
            raise UserError("a stream is not mixed with other sources, and has no weight: leave out --data.streaming")
        if is_mixture and self.revision is not None:
            raise UserError("--data.revision is for one source: of several, write each as user/name@revision")
        if names not in (0, len(self.source)):
            raise UserError(f"--data.config-name: {names} names, {len(self.source)} sources; `default` is a default's")

    def _check_weights(self) -> None:
        given = f"--data.weights {' '.join(f'{weight:g}' for weight in self.weights)}"
        if self.weights and len(self.weights) != len(self.source):
            raise UserError(f"{given}: give one for each source, {len(self.source)} in all")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            raise UserError(f"{given}: a weight cannot be negative or without end")
        if self.weights and not any(self.weights):
            raise UserError(f"{given}: nothing would be trained on")

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those of `where`."""
        return tuple(map(Condition.parse, self.where))

    def require_one_source(self) -> None:
        """Raise `UserError` if there are several."""
        if (number := len(self.source)) > 1:
            raise UserError(f"--data.source: one is wanted here, these are {number}: {', '.join(self.source)}")

    @property
    def only_source(self) -> str:
        """The one source, where more cannot be."""
        self.require_one_source()
        return self.source[0]

    @property
    def only_config_name(self) -> str | None:
        """The configuration of the one source; None: its default."""
        return self.config_name[0] if self.config_name else None

    @property
    def which(self) -> dict:
        """Which table of the one source, and where its pictures are: options of `open_tables`."""
        names = {"revision": self.revision, "config_name": self.only_config_name}
        return names | {"image_folder": self.image_folder}

    def each(self) -> list["CaptionDataConfig"]:
        """The settings of each source alone, without its weight."""
        if len(self.source) == 1:
            return [attrs.evolve(self, weights=())]
        names = self.config_name or ("default",) * len(self.source)
        own = [() if name == "default" else name for name in names]
        return [attrs.evolve(self, source=one, weights=(), config_name=name) for one, name in zip(self.source, own)]
