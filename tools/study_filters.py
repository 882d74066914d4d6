"""What a filter by CLIPScore is worth: captions of which 30 % are lies are written, filtered, and trained on.

    python -m tools.study_filters
    python -m tools.study_filters --quick
    python -m tools.study_filters --out filters.json

A CLIP, and a captioner over its vision tower, are trained on the captions as they were written ("unfiltered"), on those
that pass the filter ("filtered"), and on the true captions of the same scenes ("clean"): with as many updates each, and
measured on held-out scenes. The CLIP of the filter learns from true captions of a few other scenes. Its least score is
that which 95 % of true captions of yet other scenes reach: the filter does not know how many captions are lies.
"""

from pathlib import Path

import attrs
import numpy as np

from mlxmm.captioners.grammar_writer import GrammarWriter
from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from tools.caption_study import (
    CaptionedScenes,
    Metrics,
    Pairs,
    Study,
    clip_metrics,
    drawn_source,
    run_command,
    say,
    trained_captioner,
    trained_clip,
    true_pairs,
    write,
)

LIES = 0.3
LOST = 0.05  # of the true captions that the least score is chosen by


@attrs.frozen(kw_only=True)
class Sizes:
    """Scenes and updates."""

    num_train: int = 4_000  # scenes whose captions are written
    num_clean: int = 1_000  # other scenes: the CLIP of the filter learns from their true captions
    num_calibration: int = 500  # yet other scenes: by their true captions the least score is chosen
    num_test: int = 512
    clip_steps: int = 600
    captioner_steps: int = 600


QUICK = Sizes(num_train=1_500, num_clean=1_000, num_calibration=200, clip_steps=250, captioner_steps=100, num_test=256)
FILTER = {
    "precision": "dropped captions that are lies",
    "precision_chance": "if it dropped at random",
    "recall": "lies that are dropped",
    "recall_chance": "if it dropped at random",
}
ARMS = {
    "num_captions": "captions",
    "lies": "lies",
    "zero_shot": "zero-shot",
    "zero_shot_chance": "chance",
    "retrieval": "retrieval",
    "retrieval_chance": "chance",
    "exact_match": "exact match",
    "exact_match_shuffled": "of other pictures",
}


def study(sizes: Sizes, seed: int, folder: Path) -> dict[str, Metrics]:
    """The metrics of each arm; those of the filter are with "filtered"."""
    source = drawn_source(ShapesConfig(num_train=sizes.num_train, num_val=64, num_test=sizes.num_test), seed)
    rows = source.rows["train"]
    writer = GrammarWriter(rows, lies=LIES, seed=seed)
    written = write(rows, range(len(rows)), writer, folder / "written")
    is_lie = np.array([writer.is_lie(rows[scene]["image"]) for scene, _ in written.pairs])
    clip, least = trained_filter(source, sizes, seed, folder / "filter")
    kept = np.array([verdict.kept for verdict in written.judged(clip, min_clip_score=least)])
    passed = [pair for pair, keep in zip(written.pairs, kept) if keep]
    arms = {"unfiltered": written.pairs, "filtered": passed, "clean": true_pairs(rows, range(len(rows)))}
    found = {name: trained(name, source, pairs, sizes, seed, folder / name) for name, pairs in arms.items()}
    shares = {"unfiltered": is_lie.mean(), "filtered": is_lie[kept].mean(), "clean": 0.0}
    metrics = {name: found[name] | {"lies": float(share)} for name, share in shares.items()}
    return metrics | {"filtered": metrics["filtered"] | filter_metrics(~kept, is_lie)}


def trained_filter(source: CaptionSource, sizes: Sizes, seed: int, folder: Path) -> tuple[ContrastiveCLIP, float]:
    """The CLIP of the filter and its least score, from scenes that are in no other split."""
    say(f"seed {seed}: the CLIP of the filter")
    others = attrs.evolve(source.rows["train"], epoch=1, num_rows=sizes.num_clean + sizes.num_calibration)
    clean, calibration = range(sizes.num_clean), range(sizes.num_clean, len(others))
    train = CaptionedScenes(others, true_pairs(others, clean))
    clip = trained_clip(source, train, sizes.clip_steps, seed, folder / "clip")
    verdicts = write(others, calibration, GrammarWriter(others), folder / "calibration").judged(clip)
    return clip, float(np.quantile([verdict.scores["clip_score"] for verdict in verdicts], LOST))


def filter_metrics(dropped: np.ndarray, is_lie: np.ndarray) -> Metrics:
    """Precision and recall of what is dropped (N,) against the lies (N,), and those of as many dropped at random."""
    hits = float((dropped & is_lie).sum())
    return {
        "precision": hits / max(1, dropped.sum()),
        "precision_chance": float(is_lie.mean()),
        "recall": hits / max(1, is_lie.sum()),
        "recall_chance": float(dropped.mean()),
    }


def trained(name: str, source: CaptionSource, pairs: Pairs, sizes: Sizes, seed: int, folder: Path) -> Metrics:
    """The metrics of a CLIP and of a captioner over its tower, trained on `pairs`."""
    say(f"seed {seed}: {name}, {len(pairs)} captions")
    train = CaptionedScenes(source.rows["train"], pairs)
    clip = trained_clip(source, train, sizes.clip_steps, seed, folder / "clip")
    steps = sizes.captioner_steps
    _, metrics = trained_captioner(source, train, folder / "clip", steps, seed, folder / "captioner")
    return {"num_captions": len(pairs)} | clip_metrics(clip, source, seed) | metrics


if __name__ == "__main__":
    run_command(Study(study, Sizes(), QUICK, (FILTER, ARMS)), __doc__)
