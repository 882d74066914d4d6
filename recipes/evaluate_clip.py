"""Judge a CLIP: retrieval, zero-shot classification, linear probe, with chance beside each figure.

    python -m recipes.evaluate_clip --module runs/train_clip/mine/model
    python -m recipes.evaluate_clip --module openai/clip-vit-base-patch32 --data.source flickr.parquet \\
        --data.split-column split
    python -m recipes.evaluate_clip --module openai/clip-vit-base-patch32 --data.source cifar.parquet \\
        --data.caption-column label --labels --probe --templates imagenet-7

With --labels the caption column holds class names. Without, captions are found by their pictures and pictures by
their captions; with --class-column, or of `shapes`, which knows what its pictures show, some are classified too.
"""

from collections.abc import Sequence

import attrs
from attrs.validators import ge

from mlxmm.config import UserError, option, run_recipe
from mlxmm.data.datamodule import CaptionData, CaptionDataConfig
from mlxmm.data.shapes import names_several, single_objects
from mlxmm.data.templates import CHOICES, TEMPLATES, read_templates
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.modules.features import probe, retrieve
from mlxmm.modules.zero_shot import ZeroShotClassifier
from mlxmm.run import RunConfig, open_run

NUM_EACH = 10  # new pictures of each object of `shapes`


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """A CLIP, and what to judge it on."""

    module: str = option("openai/clip-vit-base-patch32", "CLIP or SigLIP: folder or Hub id")
    data: CaptionDataConfig = CaptionDataConfig()
    split: str = option("test", "part of the data to judge on")
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
    clip = ContrastiveCLIP.from_pretrained(config.module)
    data = CaptionData(config.data, config.seed)
    data.setup()
    data.check_split(config.split)
    _check(config, data)
    run = open_run(config, "evaluate_clip")
    figures = judge(config, clip, data)
    run.write_summary(figures)
    run.print(table(figures))
    run.print(f"summary: {run.folder / 'summary.json'}")


def _check(config: Config, data: CaptionData) -> None:
    """Raise `UserError` where `data` cannot give what is asked for."""
    if config.labels and data.config.streaming:
        raise UserError("--labels reads all training pictures, which a stream has not at once: no --data.streaming")
    if config.probe and not (config.labels or data.is_synthetic):
        raise UserError("--probe wants class names: add --labels, and --data.caption-column if it is not `caption`")
    if config.class_column is not None:
        _one_each(config, data)


def judge(config: Config, clip: ContrastiveCLIP, data: CaptionData) -> dict[str, float]:
    """All figures that `config` asks for, by name; chance for "x" is called "x_chance"."""
    if data.is_synthetic:
        figures = judge_shapes(clip, data, config.seed) | retrieval_figures(clip, data.rows[config.split])
        parts = [_objects(data, config.seed + i) for i in (1, 2, 0)]
    elif not config.labels:
        figures, parts = retrieval_figures(clip, _limited(data.rows[config.split], config.max_images)), None
    else:
        parts = [_labelled(data.rows[split], config.max_images) for split in ("train", "val", config.split)]
        images, labels = zip(*parts[2])
        names = sorted({label for part in parts for _, label in part})
        figures = _zero_shot(config, clip, names, images, labels)
    if config.class_column is not None:
        images, labels = zip(*_labelled(_one_each(config, data), config.max_images))
        figures |= _zero_shot(config, clip, list(dict.fromkeys(labels)), images, labels)
    return figures | (_under("linear_probe", probe(clip, *parts)) if config.probe else {})


def judge_shapes(clip: ContrastiveCLIP, data: CaptionData, seed: int) -> dict[str, float]:
    """Zero-shot accuracy on `shapes`: of single objects by name, and of two objects by their whole caption, among
    all such captions of the test part, whose combinations were seen in training or not."""
    images, labels = zip(*_objects(data, seed))
    names = [str(thing) for thing in data.grammar.seen_things()]
    figures = _accuracy("accuracy", clip, names, images, labels)
    for part in data.test_parts:
        rows = [row for row in data.rows[part] if names_several(row["captions"][0])]
        captions = [row["captions"][0] for row in rows]
        name = "pairs" + part.removeprefix("test")
        figures |= _accuracy(name, clip, sorted(set(captions)), [row["image"] for row in rows], captions)
    return figures


def retrieval_figures(clip: ContrastiveCLIP, rows: Sequence[dict]) -> dict[str, float]:
    """`retrieve`, its names under "retrieval/"."""
    return _under("retrieval", retrieve(clip, rows))


def table(figures: dict[str, float]) -> str:
    """A line for each figure, chance beside it where it is known."""
    lines = [f"{'':<36}{'':>10}{'chance':>10}"]
    for name, value in figures.items():
        if not name.endswith("_chance"):
            chance = figures.get(f"{name}_chance")
            lines.append(f"{name:<36}{value:>10.4f}" + (f"{chance:>10.4f}" if chance is not None else ""))
    return "\n".join(lines)


def _accuracy(name: str, clip: ContrastiveCLIP, names: list[str], images: Sequence, labels: Sequence[str]) -> dict:
    if not labels:  # a few pictures may all be of single objects
        return {}
    figures = ZeroShotClassifier.build(clip, names, TEMPLATES["name"]).top_k(images, labels)
    return {f"zero_shot/{name}": figures["top1"], f"zero_shot/{name}_chance": figures["top1_chance"]}


def _zero_shot(config: Config, clip: ContrastiveCLIP, names: list[str], images: Sequence, labels: Sequence[str]):
    classifier = ZeroShotClassifier.from_cache(clip, names, read_templates(config.templates))
    return _under("zero_shot", classifier.top_k(images, labels))


def _one_each(config: Config, data: CaptionData) -> Sequence[dict]:
    if data.is_synthetic:
        raise UserError("--class-column is for pictures from a source: `shapes` has no columns")
    return data.rows[config.split].first_of_each(config.class_column)


def _objects(data: CaptionData, seed: int) -> list[tuple]:
    return [(image, str(thing)) for image, thing in single_objects(data.grammar, seed, NUM_EACH)]


def _labelled(rows: Sequence[dict], most: int) -> list[tuple]:
    return [(row["image"], row["captions"][0]) for row in _limited(rows, most)]


def _limited(rows: Sequence[dict], most: int) -> Sequence[dict]:
    return [rows[i] for i in range(min(most, len(rows)))]


def _under(name: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in figures.items()}


if __name__ == "__main__":
    run_recipe(main, {"default": Config()})
