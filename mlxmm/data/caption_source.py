"""CaptionSource: pictures with captions from anywhere, opened once: rows by split, texts, and what was skipped."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
from attrs.validators import ge

from mlxmm.config import option, section
from mlxmm.data.sources.rows import Rows, is_stream, open_rows, unlisted_pictures
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar, ShapesTexts
from mlxmm.data.sources.stream import open_stream
from mlxmm.data.sources.tables import Columns
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.progress_bar import staged
from mlxmm.storage.hub import is_hub_id, split_revision
from mlxmm.terminal import say

MAX_THREADS = 8  # each holds a batch that it prepares


@attrs.frozen(kw_only=True)
class BatchConfig:
    """How pictures with captions become batches, wherever they come from."""

    batch_size: int = option(64, "pictures in a batch of each process", ge(1), flag="--batch-size", first=True)
    num_threads: int = option(
        0, f"threads that decode pictures ahead; 0: one for each core of this process, at most {MAX_THREADS}", ge(0)
    )
    random_crop: bool = option(False, "train on a random square of each picture, not on its middle")
    shuffle_buffer: int = option(1_000, "pictures of a stream that the next one is drawn from", ge(1), rare=True)

    @property
    def num_decoding_threads(self) -> int:
        """`num_threads`, or as many as this machine has for this process. What they make does not depend on it."""
        return self.num_threads or min(MAX_THREADS, collectives.cores_per_process())


@attrs.frozen(kw_only=True)
class CaptionDataConfig(BatchConfig):
    """Which pictures and captions, and how they become batches."""

    source: str = option(
        "shapes",
        "`shapes` (drawn), a parquet file or glob, a folder of images with metadata, or a data set on the Hub "
        "(user/name, user/name@revision)",
        first=True,
    )
    revision: str | None = option(None, "commit, tag or branch of a data set on the Hub, if its id names none")
    config_name: str | None = option(
        None, "configuration of a data set on the Hub, or of a folder with a card; none: its default"
    )
    image_column: str = option("image", "column that holds the picture")
    caption_column: str = option("caption", "column that holds a caption or a list of captions")
    split_column: str | None = option(None, "column that says train, val or test; none: the source's own splits")
    streaming: bool = option(False, "train on pictures as they are read, without loading all of them first")
    held_out: int = option(
        1_000, "most pictures of a stream's val and test splits, which are kept in memory", ge(1), rare=True
    )
    shapes: ShapesConfig = section(ShapesConfig(), rare=True)

    def __attrs_post_init__(self):
        if self.streaming and self.source == "shapes":
            raise UserError("streaming needs a source: `shapes` are drawn, not read")
        if is_hub_id(self.source):
            split_revision(self.source, self.revision)  # two are refused as soon as the flags are read


@attrs.frozen(kw_only=True)
class CaptionSource:
    """Rows by split ("train", "val", "test", more test splits), never changed once they are open.

    With `streaming` the training rows are `StreamRows`: they have no length and no numbers. `skipped` names the rows
    that were left out: those without a caption, or whose picture cannot be decoded.
    """

    rows: Mapping[str, Rows]
    config: BatchConfig = BatchConfig()
    seed: int = 0
    skipped: tuple[str, ...] = ()
    grammar: ShapesGrammar | None = None  # of `shapes` only

    @property
    def is_synthetic(self) -> bool:
        """Whether new training pictures can be drawn at will."""
        return self.grammar is not None

    @property
    def test_splits(self) -> list[str]:
        """The splits that captions are judged on: those whose names begin with "test"."""
        return [split for split in self.rows if split.startswith("test")]

    def require_split(self, split: str) -> None:
        """Raise `UserError` where a split is not there, or is a stream, whose rows have no numbers."""
        splits = [name for name, rows in self.rows.items() if not is_stream(rows)]
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
        if is_stream(self.rows["train"]):
            raise UserError("a language model is not trained on a stream, whose captions are not all there at once")
        return [("", caption) for caption in self.rows["train"].captions()]

    def sample_texts(self, most: int = 5_000) -> list[tuple[str, str]]:
        """The first texts: enough to train a tokenizer on."""
        if is_stream(self.rows["train"]):
            return [("", caption) for caption in islice(self.rows["train"].captions(), most)]
        texts = self.texts()
        return [texts[i] for i in range(min(len(texts), most))]

    def sample_captions(self) -> list[str]:
        """The captions of `sample_texts`."""
        return [caption for _, caption in self.sample_texts()]


@staged("opening data")
def open_source(config: CaptionDataConfig, seed: int) -> CaptionSource:
    """Open what `config.source` names. A collective call.

    Raises `UserError` where it, a column or a split is missing or damaged.
    """
    if config.source == "shapes":
        grammar = ShapesGrammar(config.shapes, seed)
        return CaptionSource(config=config, seed=seed, rows=MappingProxyType(grammar.rows(seed)), grammar=grammar)
    opened, unlisted = _open_splits(config, seed)
    usable: dict[str, Any] = dict(opened)
    skipped: list[str] = []
    for split, part in usable.items():
        if is_stream(part):  # its rows are checked as they are read
            continue
        part, captionless = part.without_captionless()
        usable[split], undecodable = part.without_undecodable(config.num_decoding_threads)
        skipped += captionless + undecodable
        _report_skipped("has no caption", captionless)
        _report_skipped("cannot be decoded", undecodable)
    if unlisted:
        first = ", ".join(map(str, unlisted[:5]))
        _report_skipped(f"{len(unlisted)} pictures that the metadata do not name", [first])
    return CaptionSource(config=config, seed=seed, rows=MappingProxyType(usable), skipped=tuple(skipped))


def _open_splits(config: CaptionDataConfig, seed: int) -> tuple[dict[str, Rows], list[Path]]:
    """The rows of each split, and the pictures of a folder that its metadata do not name."""
    columns = Columns(image=config.image_column, caption=config.caption_column, split=config.split_column)
    which = {"revision": config.revision, "config_name": config.config_name}
    if config.streaming:
        return open_stream(config.source, columns, num_held_out=config.held_out, **which), []
    rows = open_rows(config.source, columns, seed=seed, **which)
    return rows, unlisted_pictures(Path(config.source), rows)


def _report_skipped(why: str, names: Sequence[str]) -> None:
    for name in names if collectives.rank() == 0 else ():
        say(f"skipped, {why}: {name}")
