"""How good a captioner is over a whole split, with a control beside each metric: captions of other images.

N images, E features of the shared space of a CLIP.
"""

import sys
from collections.abc import Sequence

import attrs
import mlx.core as mx

from mlxmm.data.loader import Loader
from mlxmm.errors import UserError
from mlxmm.evaluation import caption_metrics
from mlxmm.evaluation.clip_features import image_features, text_features
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.preprocessing.tokenizers import encode
from mlxmm.training.trainer import Trainer

CONTROL = "_shuffled"  # ends the names of metrics whose captions were given to other images


@attrs.frozen
class Images(Sequence):
    """The images of `rows`, or of the first `most` of them, decoded when they are asked for."""

    rows: Sequence
    most: int = sys.maxsize

    def __len__(self) -> int:
        return min(len(self.rows), self.most)

    def __getitem__(self, places: int | slice):
        if isinstance(places, slice):
            return [self.rows[i]["image"] for i in range(len(self))[places]]
        return self.rows[places]["image"]


def evaluate(
    captioner: CaptioningModule,
    rows: Sequence[dict],
    *,
    clip: ContrastiveCLIP | None = None,
    batch_size: int = 64,
    **generation,
) -> tuple[dict[str, float], list[dict]]:
    """Caption the image of each row: the metrics of all captions, and for each row its caption and its own scores.

    `clip` adds CLIPScore and RefCLIPScore. `generation` are settings of `GenerationConfig`.
    """
    references = [rows[i]["captions"] for i in range(len(rows))]
    captions = captioner.caption(Images(rows), **generation)
    features = None if clip is None else mx.array(image_features(clip, Images(rows)))
    metrics, scores = score(captions, references, clip, features)
    control, _ = score(shuffled(captions), references, clip, features)
    metrics |= {f"{name}{CONTROL}": value for name, value in control.items() if not name.startswith("distinct")}
    metrics |= perplexities(captioner, rows, batch_size)
    each = [
        {"id": rows[i]["id"], "caption": captions[i], "references": references[i]} | scores[i] for i in range(len(rows))
    ]
    return metrics, each


def score(
    captions: list[str],
    references: list[list[str]],
    clip: ContrastiveCLIP | None = None,
    images: mx.array | None = None,
) -> tuple[dict[str, float], list[dict]]:
    """The metrics of all captions together, and the scores of each. `clip` needs `images`, their features (N, E)."""
    each = [{"cider_d": value} for value in caption_metrics.cider_d_scores(captions, references)]
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


def shuffled(captions: list[str]) -> list[str]:
    """Give each caption to another image: the one half the list away."""
    half = max(1, len(captions) // 2)
    return captions[half:] + captions[:half]


def require_room(clip: ContrastiveCLIP, texts: Sequence[str], prompt: str = caption_metrics.CLIP_SCORE_PROMPT) -> None:
    """Raise `UserError` if CLIP would cut off most of `texts`: a small CLIP may read CLIPScore's prompt alone."""
    length = clip.config.text.max_position_embeddings
    num_cut = sum(len(ids) > length for ids in encode(clip.tokenizer, [prompt + text for text in texts])["input_ids"])
    if num_cut > len(texts) / 2:
        raise UserError(
            f"the CLIP reads {length} tokens: {num_cut} of {len(texts)} texts do not fit after {prompt!r}; "
            "name a CLIP with a longer context, or none"
        )


def clip_scores(
    clip: ContrastiveCLIP, images: mx.array, captions: list[str], references: list[list[str]]
) -> dict[str, mx.array]:
    """CLIPScore and RefCLIPScore of each caption, (N,) each, given features (N, E) of the images."""
    most = max(map(len, references))
    padded = [text for refs in references for text in [*refs, *[""] * (most - len(refs))]]
    encode = lambda texts: mx.array(text_features(clip, prompted(texts)))
    wanted = encode(padded).reshape(len(captions), most, -1)
    present = mx.arange(most) < mx.array([len(refs) for refs in references])[:, None]
    generated = encode(captions)
    return {
        "clip_score": caption_metrics.clip_score(images, generated),
        "ref_clip_score": caption_metrics.ref_clip_score(images, generated, wanted, present),
    }


def prompted(texts: Sequence[str]) -> list[str]:
    """The texts with CLIPScore's prompt before them."""
    return [caption_metrics.CLIP_SCORE_PROMPT + text for text in texts]


def perplexities(captioner: CaptioningModule, rows: Sequence[dict], batch_size: int) -> dict[str, float]:
    """Perplexity of the first reference of each image, and of the same texts after other images."""
    loader = Loader(
        rows=rows,
        transform=lambda row, rng: captioner.transform(row, row["captions"][0]),
        batch_size=min(batch_size, len(rows)),
        collate=captioner.collate,
    )
    means = Trainer(logger=False, enable_model_summary=False).test(captioner, dataloaders=loader, verbose=False)
    names = {"perplexity": "test/loss", f"perplexity{CONTROL}": "test/loss_shuffled"}
    return {name: caption_metrics.perplexity(means[loss], 1) for name, loss in names.items()}
