"""DataModule, and CaptionData: pictures with captions from any source, ready for a Trainer."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import attrs
import numpy as np
from attrs.validators import ge

from mlxmm.config import option
from mlxmm.data.loader import Loader, StreamLoader
from mlxmm.data.sources.rows import open_rows, unlisted_pictures
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar, ShapesTexts
from mlxmm.data.sources.stream import open_stream
from mlxmm.data.sources.tables import Columns
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import random_square
from mlxmm.training.datamodule import DataModule


@attrs.frozen(kw_only=True)
class CaptionDataConfig:
    """Which pictures and captions, and how many at a time."""

    source: str = option(
        "shapes",
        "`shapes`, a parquet file or glob, a folder of images with metadata, or a data set on the Hub",
    )
    revision: str | None = option(None, "commit, tag or branch of a data set on the Hub")
    image_column: str = option("image", "column that holds the picture")
    caption_column: str = option("caption", "column that holds a caption or a list of them")
    split_column: str | None = option(None, "column that says train, val or test; none: the source's own splits")
    batch_size: int = option(64, "pictures in a batch of each process", ge(1))
    num_threads: int = option(1, "threads that decode pictures ahead", ge(1))
    random_crop: bool = option(False, "train on a random square of each picture, not on its middle")
    streaming: bool = option(False, "train on pictures as they are read, without loading all of them first")
    shuffle_buffer: int = option(1_000, "pictures that the next one of a stream is drawn from", ge(1))
    held_out: int = option(1_000, "most pictures of a stream's val and of its test, which are kept in memory", ge(1))
    shapes: ShapesConfig = ShapesConfig()

    def __attrs_post_init__(self):
        if self.streaming and self.source == "shapes":
            raise UserError("streaming needs a source: `shapes` are drawn, not read")


class CaptionData(DataModule):
    """Pictures with captions. `transform(row, caption)` makes an example of a row and one of its captions.

    Training draws one caption a picture and epoch; validation and test take the first. `rows` maps splits to
    rows; `test_parts` names the splits that captions are judged on. With `streaming` the training rows are
    `StreamRows`: they have no length and no numbers.
    """

    def __init__(self, config: CaptionDataConfig, seed: int, transform: Callable[[dict, str], dict] | None = None):
        self.config, self.seed, self.transform = config, seed, transform
        self.collate: Callable[[dict], dict] | None = None  # the Loader's
        self.rows: dict[str, Sequence] = {}
        self.skipped: list[str] = []  # names of pictures that cannot be decoded

    @property
    def is_synthetic(self) -> bool:
        """Whether new training pictures can be drawn at will."""
        return self.config.source == "shapes"

    def setup(self, stage=None):
        if self.rows:
            return
        if self.is_synthetic:
            self.grammar = ShapesGrammar(self.config.shapes, self.seed)
            self.rows = self.grammar.rows(self.seed)
        else:
            self._open_source()

    def _open_source(self) -> None:
        config = self.config
        columns = Columns(image=config.image_column, caption=config.caption_column, split=config.split_column)
        if config.streaming:
            rows = open_stream(config.source, columns, revision=config.revision, num_held_out=config.held_out)
            self.rows["train"], unlisted = rows.pop("train"), []
        else:
            rows = open_rows(config.source, columns, revision=config.revision, seed=self.seed)
            unlisted = unlisted_pictures(Path(config.source), rows)
        for split, part in rows.items():
            part, silent = part.without_captionless()
            self.rows[split], bad = part.without_undecodable(config.num_threads)
            self.skipped += silent + bad
            _tell("has no caption", silent)
            _tell("cannot be decoded", bad)
        if unlisted:
            first = ", ".join(map(str, unlisted[:5]))
            _tell(f"{len(unlisted)} pictures that the metadata do not name", [first])

    def check_split(self, split: str) -> None:
        """Raise `UserError` where a split is not there, or a stream, whose rows have no numbers."""
        splits = [name for name in self.rows if not (self.config.streaming and name == "train")]
        if split not in splits:
            raise UserError(f"--split {split}: choose one of {', '.join(splits)}")

    def fresh_rows(self, epoch: int) -> Sequence:
        """New training scenes of the same kind, a function of (seed, epoch)."""
        return self.grammar.rows(self.seed, epoch)["train"]

    def texts(self) -> Sequence[tuple[str, str]]:
        """(notes, caption) pairs that a language model of these data reads: the whole grammar of `shapes`, or
        all training captions, with no notes."""
        if self.is_synthetic:
            return ShapesTexts(self.grammar, self.seed)
        if self.config.streaming:
            raise UserError("a language model is not trained on a stream, whose captions are not all there at once")
        return [("", caption) for caption in self.rows["train"].captions()]

    def sample_texts(self, most: int = 5_000) -> list[tuple[str, str]]:
        """The first texts: enough to train a tokenizer on."""
        if self.config.streaming:
            return [("", caption) for caption in islice(self.rows["train"].captions(), most)]
        texts = self.texts()
        return [texts[i] for i in range(min(len(texts), most))]

    @property
    def test_parts(self) -> list[str]:
        """The splits whose names begin with "test"."""
        return [split for split in self.rows if split.startswith("test")]

    def train_dataloader(self):
        if self.config.streaming:
            return self._stream_loader()
        return self._loader("train", self._draw, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return self._loader("val", self._first)

    def test_dataloader(self):
        return self._loader("test", self._first)

    def _loader(self, split: str, transform: Callable, **options) -> Loader:
        share = len(self.rows[split]) // collectives.world_size()
        batch_size = max(1, min(self.config.batch_size, share))
        return Loader(
            rows=self.rows[split],
            transform=transform,
            batch_size=batch_size,
            seed=self.seed,
            num_threads=self.config.num_threads,
            collate=self.collate,
            **options,
        )

    def _stream_loader(self) -> StreamLoader:
        return StreamLoader(
            rows=self.rows["train"],
            transform=self._draw,
            batch_size=self.config.batch_size,
            seed=self.seed,
            buffer_size=self.config.shuffle_buffer,
            num_threads=self.config.num_threads,
            collate=self.collate,
        )

    def _draw(self, row: dict, rng: np.random.Generator) -> dict:
        caption = row["captions"][int(rng.integers(len(row["captions"])))]
        if self.config.random_crop:
            row = row | {"image": random_square(row["image"], rng)}
        return self.transform(row, caption)

    def _first(self, row: dict, rng: np.random.Generator) -> dict:
        return self.transform(row, row["captions"][0])


def _tell(why: str, names: Sequence[str]) -> None:
    for name in names if collectives.rank() == 0 else ():
        print(f"skipped, {why}: {name}")
