"""Evaluate a CLIP by zero-shot classification and retrieval."""

from collections.abc import Sequence

from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.sources.shapes import names_several, single_objects
from mlxmm.evaluation.clip_features import retrieve
from mlxmm.evaluation.prompt_templates import TEMPLATES
from mlxmm.evaluation.zero_shot import ZeroShotClassifier
from mlxmm.modules.contrastive_clip import ContrastiveCLIP

NUM_EACH = 10  # images drawn of each object of `shapes`


def evaluate_shapes(clip: ContrastiveCLIP, source: CaptionSource, seed: int) -> dict[str, float]:
    """Zero-shot accuracy on `shapes`: of single objects by name, and of pairs of objects by their caption.

    Pairs are classified among all captions of pairs in their test split; one split has combinations that training
    lacks. Chance for "x" is "x_chance".
    """
    images, labels = zip(*labelled_objects(source, seed))
    names = [str(thing) for thing in source.grammar.trainable_things()]
    metrics = _accuracy("accuracy", clip, names, images, labels)
    for part in source.test_splits:
        split = source.rows[part]
        rows = [row for row in (split[i] for i in range(len(split))) if names_several(row["captions"][0])]
        captions = [row["captions"][0] for row in rows]
        name = "pairs" + part.removeprefix("test")
        metrics |= _accuracy(name, clip, sorted(set(captions)), [row["image"] for row in rows], captions)
    return metrics


def retrieval_metrics(clip: ContrastiveCLIP, rows: Sequence[dict]) -> dict[str, float]:
    """The metrics of `retrieve`, with the prefix "retrieval/"."""
    return with_prefix("retrieval", retrieve(clip, rows))


def _accuracy(name: str, clip: ContrastiveCLIP, names: list[str], images: Sequence, labels: Sequence[str]) -> dict:
    if not labels:  # in a small split every image may show a single object
        return {}
    metrics = ZeroShotClassifier.build(clip, names, TEMPLATES["name"]).top_k(images, labels)
    return {f"zero_shot/{name}": metrics["top1"], f"zero_shot/{name}_chance": metrics["top1_chance"]}


def labelled_objects(source: CaptionSource, seed: int) -> list[tuple]:
    return [(image, str(thing)) for image, thing in single_objects(source.grammar, seed, NUM_EACH)]


def with_prefix(name: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in metrics.items()}
