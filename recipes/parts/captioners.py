"""What a captioning job is: who writes captions, of which pictures, by which prompts."""

import attrs
from attrs.validators import ge, gt, le

from mlxmm.captioners.caption_writer import CaptionWriter, Sampling
from mlxmm.captioners.grammar_writer import GrammarWriter
from mlxmm.captioners.mlx_vlm_writer import MlxVlmConfig, MlxVlmWriter
from mlxmm.captioners.own_writer import OwnWriter
from mlxmm.captioners.records import Provenance
from mlxmm.captioners.server_writer import ServerConfig, ServerWriter
from mlxmm.config import checked, option, section
from mlxmm.data.caption_source import CaptionDataConfig
from mlxmm.data.sources.shapes import ShapesGrammar
from mlxmm.errors import UserError
from mlxmm.modules.loading import KINDS
from mlxmm.storage.hub import settings_folder
from mlxmm.storage.pretrained import read_config

from .named_parts import check_parts

GRAMMAR = "shapes"


@attrs.frozen(kw_only=True, field_transformer=checked)
class CaptionerConfig:
    """Who writes."""

    model: str | None = option(
        None,
        "captioner: a checkpoint, folder or Hub id of ours, or of a vision-language model that mlx-vlm reads, as "
        "Qwen/Qwen2.5-VL-3B-Instruct; `shapes`: the grammar of drawn pictures",
        first=True,
    )
    url: tuple[str, ...] = option(
        (), "OpenAI-compatible servers that write instead, as http://localhost:1234/v1; `model` is theirs", first=True
    )
    concurrency: int = option(4, "requests at once to each server", ge(1))
    batch_size: int = option(0, "most pictures that are captioned together; 0: 64, and 8 with mlx-vlm", ge(0))
    max_pixels: int = option(602_112, "larger pictures are made smaller, for mlx-vlm and servers", ge(28 * 28))
    timeout_seconds: float = option(
        600.0, "a batch of mlx-vlm, loading it, or a request to a server, that takes longer has failed", gt(0)
    )
    lies: float = option(0.0, "fraction of pictures that `shapes` writes a wrong caption for", ge(0), le(1))


@attrs.frozen(kw_only=True, slots=False, field_transformer=checked)  # recipes derive their Config from this and another
class JobConfig:
    """What all shards of a job have in common."""

    data: CaptionDataConfig = section(
        CaptionDataConfig(), without=("batch_size", "random_crop", "captions", "weights", "where")
    )
    captioner: CaptionerConfig = section(CaptionerConfig())
    sampling: Sampling = section(Sampling())
    split: str | None = option(
        None,
        "split whose pictures get captions: train, val, test, or all; none: all, or train where the source has splits",
        first=True,
    )
    only_missing: bool = option(
        False, "only pictures without a caption: rows that have none, files that metadata do not name", first=True
    )
    prompts: tuple[str, ...] = option(
        (), "ids of what is asked of each picture; none: describe, of a captioner of ours what it was trained with"
    )
    own_prompts: tuple[str, ...] = option((), "more prompts, each written id=text")


def provenance(writer: CaptionWriter, sampling: Sampling) -> Provenance:
    """What a data set says of the captions of `writer`."""
    return Provenance(
        captioner=writer.name,
        captioner_revision=writer.revision,
        quantization=getattr(writer, "quantization", None),
        sampling=sampling,
    )


def check_captioner(config: CaptionerConfig) -> None:
    """Raise `UserError`, before any picture is read, if the captioner cannot be what was named."""
    if config.model is None:
        raise UserError("--captioner.model is missing: name a captioner")
    if not config.url and config.model != GRAMMAR and is_ours(config.model):
        check_parts(captioner=config.model)


def with_prompts(config):
    """The config with the prompts that it means where it names none."""
    if config.prompts or config.captioner.model is None:
        return config
    writes = not config.captioner.url and config.captioner.model != GRAMMAR
    return attrs.evolve(config, prompts=("none" if writes and is_ours(config.captioner.model) else "describe",))


def is_ours(model: str) -> bool:
    """Whether `model` is a captioner of ours, and not one for mlx-vlm. Raises `UserError` if it is not there."""
    return read_config(settings_folder(model)).get("model_type") in KINDS


def open_captioner(config: CaptionerConfig, data: CaptionDataConfig, seed: int, split: str) -> CaptionWriter:
    """The writer that `config` names."""
    if config.url:
        shared = {"max_pixels": config.max_pixels, "timeout_seconds": config.timeout_seconds}
        return ServerWriter(ServerConfig(urls=config.url, model=config.model, concurrency=config.concurrency, **shared))
    if config.model != GRAMMAR and not is_ours(config.model):
        sizes = {"batch_size": config.batch_size or 8, "max_pixels": config.max_pixels}
        return MlxVlmWriter(MlxVlmConfig(model=config.model, timeout_seconds=config.timeout_seconds, **sizes))
    batch_size = config.batch_size or 64
    if config.model != GRAMMAR:
        return OwnWriter.from_pretrained(config.model, batch_size)
    if data.only_source != GRAMMAR:
        raise UserError(f"--captioner.model shapes knows the pictures that it draws, not those of {data.only_source}")
    rows = ShapesGrammar(data.shapes, seed).rows(seed)[split]
    return GrammarWriter(rows, lies=config.lies, seed=seed, batch_size=batch_size)
