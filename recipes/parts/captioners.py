"""What a captioning job is: who writes captions, of which pictures, by which prompts."""

import attrs
from attrs.validators import ge, le

from mlxmm.captioners.caption_writer import CaptionWriter, Sampling
from mlxmm.captioners.grammar_writer import GrammarWriter
from mlxmm.captioners.own_writer import OwnWriter
from mlxmm.config import option, section
from mlxmm.data.caption_source import CaptionDataConfig
from mlxmm.data.sources.shapes import ShapesGrammar
from mlxmm.errors import UserError

from .named_parts import check_parts

GRAMMAR = "shapes"


@attrs.frozen(kw_only=True)
class CaptionerConfig:
    """Who writes."""

    model: str | None = option(
        None, "checkpoint, folder or Hub id of a captioner; `shapes`: the grammar of drawn pictures", first=True
    )
    batch_size: int = option(64, "most pictures that are captioned together", ge(1))
    lies: float = option(0.0, "fraction of pictures that `shapes` writes a wrong caption for", ge(0), le(1))


@attrs.frozen(kw_only=True, slots=False)  # recipes derive their Config from this and another
class JobConfig:
    """What all shards of a job have in common."""

    data: CaptionDataConfig = section(CaptionDataConfig(), without=("batch_size", "random_crop", "caption_column"))
    captioner: CaptionerConfig = section(CaptionerConfig())
    sampling: Sampling = section(Sampling())
    split: str = option("train", "split whose pictures get captions: train, val, test, or all", first=True)
    prompts: tuple[str, ...] = option(("describe",), "ids of what is asked of each picture", first=True)
    own_prompts: tuple[str, ...] = option((), "more prompts, each written id=text")


def check_captioner(config: CaptionerConfig) -> None:
    """Raise `UserError`, before any picture is read, if the captioner cannot be what was named."""
    if config.model is None:
        raise UserError("--captioner.model is missing: name a captioner")
    if config.model != GRAMMAR:
        check_parts(captioner=config.model)


def open_captioner(config: CaptionerConfig, data: CaptionDataConfig, seed: int, split: str) -> CaptionWriter:
    """The writer that `config` names."""
    if config.model != GRAMMAR:
        return OwnWriter.from_pretrained(config.model, config.batch_size)
    if data.source != GRAMMAR:
        raise UserError(f"--captioner.model shapes knows the pictures that it draws, not those of {data.source}")
    rows = ShapesGrammar(data.shapes, seed).rows(seed)[split]
    return GrammarWriter(rows, lies=config.lies, seed=seed, batch_size=config.batch_size)
