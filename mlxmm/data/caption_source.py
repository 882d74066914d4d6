"""CaptionSource: pictures with captions from anywhere, opened once: rows by split, texts, and what was skipped."""

from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

import attrs

from mlxmm.data.caption_config import SHAPES, BatchConfig, CaptionDataConfig
from mlxmm.data.lineage import describe
from mlxmm.data.loader import Part
from mlxmm.data.mixture import mix
from mlxmm.data.sources.mixed import MixedRows
from mlxmm.data.sources.rows import Rows, is_stream
from mlxmm.data.sources.shapes import ShapesGrammar, ShapesTexts
from mlxmm.data.splits import open_splits
from mlxmm.errors import UserError
from mlxmm.progress_bar import staged


@attrs.frozen(kw_only=True)
class CaptionSource:
    """Rows by split ("train", "val", "test", more test splits), never changed once they are open.

    With `streaming` the training rows are `StreamRows`: they have no length and no numbers. `skipped` names the rows
    that were left out: those without a caption, or whose picture cannot be decoded. `lineage` says of each source
    where its training rows come from.
    """

    rows: Mapping[str, Rows]
    config: BatchConfig = BatchConfig()
    seed: int = 0
    skipped: tuple[str, ...] = ()
    grammar: ShapesGrammar | None = None  # of `shapes` as the first source only
    parts: tuple[Part, ...] = ()  # of the training rows, where an epoch does not have each once
    lineage: tuple[dict, ...] = ()  # see `mlxmm/storage/lineage.py`

    @property
    def is_synthetic(self) -> bool:
        """Whether new training pictures can be drawn at will."""
        return self.grammar is not None

    @property
    def fingerprints(self) -> list[str]:
        """Of each source the checksum of its training rows: of what is trained on it and kept, a part of the key."""
        return [one["fingerprint"] for one in self.lineage]

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
        """New training scenes of the same kind, a function of (seed, epoch); in a mixture, with the other sources'
        rows as they are."""
        fresh = self.grammar.rows(self.seed, epoch)["train"]
        rows = self.rows["train"]
        return rows.with_first(fresh) if isinstance(rows, MixedRows) else fresh

    def texts(self) -> Sequence[tuple[str, str]]:
        """(notes, caption) pairs that a language model of these data reads: the whole grammar of `shapes` alone, or
        all training captions, with no notes."""
        if self.is_synthetic and not self._is_mixed:
            return ShapesTexts(self.grammar, self.seed)
        if is_stream(self.rows["train"]):
            raise UserError("a language model is not trained on a stream, whose captions are not all there at once")
        return [("", caption) for caption in self.rows["train"].captions()]

    def sample_texts(self, most: int = 5_000) -> list[tuple[str, str]]:
        """The first texts, of a mixture some from all over it: enough to train a tokenizer on."""
        if is_stream(self.rows["train"]):
            return [("", caption) for caption in islice(self.rows["train"].captions(), most)]
        texts = self.texts()
        step = -(-len(texts) // most) if self._is_mixed else 1
        return [texts[i] for i in range(0, min(len(texts), most * step), step)]

    def sample_captions(self) -> list[str]:
        """The captions of `sample_texts`."""
        return [caption for _, caption in self.sample_texts()]

    @property
    def _is_mixed(self) -> bool:
        return isinstance(self.rows["train"], MixedRows)


@staged("opening data")
def open_source(config: CaptionDataConfig, seed: int, *, to_train: bool = True) -> CaptionSource:
    """Open what `config.source` names: one source, or several, which are mixed. A collective call.

    One that is not `to_train` may lack splits, as one with nothing but "test"; without "train" it has no lineage.
    Raises `UserError` where one, a column or a split is missing or damaged, or a weight or condition leaves no rows.
    """
    opened = open_splits(config, seed, to_train=to_train)
    rows: dict[str, Any] = dict(opened[0].rows)
    if "train" not in rows:
        return CaptionSource(config=config, seed=seed, rows=MappingProxyType(rows), skipped=tuple(opened[0].skipped))
    trained, weights = [one.rows["train"] for one in opened], config.weights or (1.0,) * len(opened)
    if any(weight != 1 for weight in weights) or len(opened) > 1:
        rows["train"] = mix(config.source, [one.rows for one in opened], weights, config.num_decoding_threads)
        trained = rows["train"].selected()
    described = zip(config.each(), opened, trained, weights)
    return CaptionSource(
        config=config,
        seed=seed,
        rows=MappingProxyType(rows),
        skipped=tuple(name for one in opened for name in one.skipped),
        grammar=ShapesGrammar(config.shapes, seed) if config.source[0] == SHAPES else None,
        parts=tuple(map(Part, map(len, trained), weights)) if not set(weights) <= {0, 1} else (),
        lineage=tuple(describe(one, own.rows | {"train": train}, own.left_out, w) for one, own, train, w in described),
    )
