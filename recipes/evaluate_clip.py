"""Evaluate a CLIP: retrieval, zero-shot classification, linear probe, with chance beside each figure.

    python -m recipes.evaluate_clip --module runs/train_clip/mine/model
    python -m recipes.evaluate_clip --module openai/clip-vit-base-patch32 --data.source flickr.parquet \\
        --data.split-column split
    python -m recipes.evaluate_clip --module openai/clip-vit-base-patch32 --data.source cifar.parquet \\
        --data.caption-column label --labels --probe --templates imagenet-7

With --labels the caption column holds class names. Without, captions are found by their pictures and pictures by
their captions; with --class-column, or of `shapes`, which knows what its pictures show, some are classified too.
"""

from collections.abc import Sequence
from typing import Any

import attrs
from attrs.validators import ge

from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, option, section
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.data.sources.rows import is_stream
from mlxmm.errors import UserError
from mlxmm.evaluation.clip import evaluate_shapes, labelled_objects, retrieval_metrics, with_prefix
from mlxmm.evaluation.clip_features import probe
from mlxmm.evaluation.prompt_templates import CHOICES, read_templates
from mlxmm.evaluation.zero_shot import ZeroShotClassifier
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.storage.runs import RunConfig, model_of, open_run

from .parts.monitoring import report_split
from .parts.named_parts import check_parts


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config(RunConfig):
    """A CLIP, and what to evaluate it on."""

    module: str = option("openai/clip-vit-base-patch32", "CLIP or SigLIP: folder or Hub id", first=True)
    data: CaptionDataConfig = section(
        CaptionDataConfig(), without=("batch_size", "random_crop", "shuffle_buffer", "weights")
    )
    split: str = option("test", "split of the data to evaluate on", first=True)
    labels: bool = option(False, "captions are class names: classify, do not retrieve")
    class_column: str | None = option(
        None, "column of classes: the first picture of each is classified too, its first caption the class's name"
    )
    templates: str = option("photo", f"what class names are put into: {CHOICES}")
    probe: bool = option(False, "fit a linear probe too; needs scikit-learn (mlxmm[probe])")
    max_images: int = option(5_000, "most pictures of each part", ge(1))


def main(config: Config) -> None:
    read_templates(config.templates)
    if config.labels and config.class_column is not None:
        raise UserError("--labels and --class-column both say what the classes are: leave one out")
    config.data.require_one_source()
    with open_run(config, "evaluate_clip") as run:
        module = model_of(config.module)
        check_parts(clip=module)
        clip = ContrastiveCLIP.from_pretrained(module)
        source = open_source(config.data, config.seed, to_train=False)
        run.save_lineage(source.lineage)
        source.require_split(config.split)
        _check(config, source)
        report_split(config.split, source.rows[config.split], run)
        run.report(evaluate(config, clip, source))


def _check(config: Config, source: CaptionSource) -> None:
    """Raise `UserError` where `data` cannot give what is asked for."""
    if config.labels and any(map(is_stream, source.rows.values())):
        raise UserError("--labels reads all training pictures, which a stream has not at once: no --data.streaming")
    if config.probe and not (config.labels or source.is_synthetic):
        raise UserError("--probe wants class names: add --labels, and --data.caption-column if it is not `caption`")
    if config.probe and (missing := [split for split in ("train", "val") if split not in source.rows]):
        raise UserError(f"--probe is fitted on train and val: {config.data.only_source} has no {missing[0]}")
    if config.class_column is not None:
        _one_each(config, source)


def evaluate(config: Config, clip: ContrastiveCLIP, source: CaptionSource) -> dict[str, float]:
    """All metrics that `config` asks for, by name; chance for "x" is called "x_chance"."""
    if source.is_synthetic:
        metrics = evaluate_shapes(clip, source, config.seed) | retrieval_metrics(clip, source.rows[config.split])
        parts = [labelled_objects(source, config.seed + i) for i in (1, 2, 0)]
    elif not config.labels:
        metrics, parts = retrieval_metrics(clip, _limited(source.rows[config.split], config.max_images)), None
    else:
        splits = [split for split in ("train", "val") if split in source.rows]
        parts = [_labelled(source.rows[split], config.max_images) for split in (*splits, config.split)]
        images, labels = zip(*parts[-1])
        names = sorted({label for part in parts for _, label in part})
        metrics = _zero_shot(config, clip, names, images, labels)
    if config.class_column is not None:
        images, labels = zip(*_labelled(_one_each(config, source), config.max_images))
        metrics |= _zero_shot(config, clip, list(dict.fromkeys(labels)), images, labels)
    return metrics | (with_prefix("linear_probe", probe(clip, *parts)) if config.probe else {})


def _zero_shot(config: Config, clip: ContrastiveCLIP, names: list[str], images: Sequence, labels: Sequence[str]):
    classifier = ZeroShotClassifier.from_cache(clip, names, read_templates(config.templates))
    return with_prefix("zero_shot", classifier.top_k(images, labels))


def _one_each(config: Config, source: CaptionSource) -> Sequence[dict]:
    if source.is_synthetic:
        raise UserError("--class-column is for pictures from a source: `shapes` has no columns")
    rows: Any = source.rows[config.split]
    return rows.first_of_each(config.class_column)


def _labelled(rows: Sequence[dict], most: int) -> list[tuple]:
    return [(row["image"], row["captions"][0]) for row in _limited(rows, most)]


def _limited(rows: Sequence[dict], most: int) -> Sequence[dict]:
    return [rows[i] for i in range(min(most, len(rows)))]


if __name__ == "__main__":
    run_recipe("evaluate_clip", main, {"default": Preset("", Config())})
