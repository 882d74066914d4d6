"""What a captioner is worth over a whole split: every metric, with a control beside it.

The control, "<metric>_shuffled", holds each caption against another picture's references. N pictures, R references,
E features of a CLIP.
"""

from collections.abc import Sequence

import attrs
import mlx.core as mx

from mlxmm.data.loader import Loader
from mlxmm.errors import UserError
from mlxmm.evaluation import caption_metrics
from mlxmm.evaluation.clip_features import image_features, text_features
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.training.trainer import Trainer


@attrs.frozen
class Pictures(Sequence):
    """The pictures of some rows, decoded when they are asked for."""

    rows: Sequence

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places):
        if isinstance(places, slice):
            return [self.rows[i]["image"] for i in range(len(self.rows))[places]]
        return self.rows[places]["image"]


def evaluate_captioner(
    captioner: CaptioningModule, rows: Sequence, clip: ContrastiveCLIP | None = None, *, batch_size: int, **generation
) -> tuple[dict[str, float], list[dict]]:
    """All metrics over `rows`, and for each picture its id, caption, references and own scores.

    `generation` are settings of `GenerationConfig`. With a `clip`, CLIPScore and RefCLIPScore are among the metrics.
    """
    references = references_of(rows)
    captions = captioner.caption(Pictures(rows), **generation)
    images = None if clip is None else mx.array(image_features(clip, Pictures(rows)))
    metrics, scores = score_captions(captions, references, clip, images)
    control, _ = score_captions(shuffled(captions), references, clip, images)
    metrics |= {f"{name}_shuffled": value for name, value in control.items() if not name.startswith("distinct")}
    metrics |= perplexities(captioner, rows, batch_size)
    each = [
        {"id": rows[i]["id"], "caption": captions[i], "references": references[i]} | scores[i] for i in range(len(rows))
    ]
    return metrics, each


def references_of(rows: Sequence) -> list[list[str]]:
    """The captions of each row."""
    return [rows[i]["captions"] for i in range(len(rows))]


def shuffled(captions: list[str]) -> list[str]:
    """Each picture's caption given to another one, half of them away."""
    half = max(1, len(captions) // 2)
    return captions[half:] + captions[:half]


def score_captions(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    clip: ContrastiveCLIP | None = None,
    images: mx.array | None = None,
) -> tuple[dict[str, float], list[dict]]:
    """The metrics of all captions together, and the scores of each. `images` are features (N, E) of `clip`."""
    each = [{"cider_d": score} for score in caption_metrics.cider_d_scores(captions, references)]
    metrics = caption_metrics.coco_bleu(captions, references) | {
        "rouge_l": caption_metrics.rouge_l(captions, references),
        "cider_d": caption_metrics.cider_d(captions, references),
        "exact_match": caption_metrics.exact_match(captions, references),
        "distinct_1": caption_metrics.distinct(captions, 1),
        "distinct_2": caption_metrics.distinct(captions, 2),
    }
    if clip is not None:
        scores = clip_scores(clip, images, captions, references)
        metrics |= {name: float(values.mean()) for name, values in scores.items()}
        for i, row in enumerate(each):
            row |= {name: float(values[i]) for name, values in scores.items()}
    return metrics, each


def require_room(clip: ContrastiveCLIP, rows: Sequence) -> None:
    """Raise `UserError` where most references do not fit into CLIP's context behind CLIPScore's prompt.

    What is cut off cannot be scored, and a small CLIP may see the prompt alone.
    """
    texts = [caption_metrics.CLIP_SCORE_PROMPT + text for captions in references_of(rows) for text in captions]
    length = clip.config.text.max_position_embeddings
    num_cut = sum(len(ids) > length for ids in clip.tokenizer(texts)["input_ids"])
    if num_cut > len(texts) / 2:
        raise UserError(
            f"--clip reads {length} tokens: {num_cut} of {len(texts)} references do not fit after "
            f"{caption_metrics.CLIP_SCORE_PROMPT!r}; name a CLIP with a longer context, or none"
        )


def clip_scores(clip: ContrastiveCLIP, images: mx.array, captions, references) -> dict[str, mx.array]:
    """CLIPScore and RefCLIPScore (N,) of each caption, given features (N, E) of the pictures."""
    most = max(map(len, references))
    filled = [text for refs in references for text in [*refs, *[""] * (most - len(refs))]]
    expected = _features_after_prompt(clip, filled).reshape(len(captions), most, -1)  # (N, R, E)
    present = mx.arange(most) < mx.array([len(refs) for refs in references])[:, None]
    generated = _features_after_prompt(clip, captions)
    return {
        "clip_score": caption_metrics.clip_score(images, generated),
        "ref_clip_score": caption_metrics.ref_clip_score(images, generated, expected, present),
    }


def _features_after_prompt(clip: ContrastiveCLIP, texts: Sequence[str]) -> mx.array:
    return mx.array(text_features(clip, [caption_metrics.CLIP_SCORE_PROMPT + text for text in texts]))


def perplexities(captioner: CaptioningModule, rows: Sequence, batch_size: int) -> dict[str, float]:
    """Perplexity of the first reference of each picture, and of the same text after another picture."""
    loader = Loader(
        rows=rows,
        transform=lambda row, rng: captioner.transform(row, row["captions"][0]),
        batch_size=min(batch_size, len(rows)),
        collate=captioner.collate,
    )
    means = Trainer(logger=False, enable_model_summary=False).test(captioner, dataloaders=loader)
    names = {"perplexity": "test/loss", "perplexity_shuffled": "test/loss_shuffled"}
    return {name: caption_metrics.perplexity(means[loss], 1) for name, loss in names.items()}
