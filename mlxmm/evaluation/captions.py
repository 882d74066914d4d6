"""What a captioner is worth over a whole split, with a control beside each metric."""

from collections.abc import Sequence

import attrs
import mlx.core as mx

from mlxmm.data.loader import Loader
from mlxmm.errors import UserError
from mlxmm.evaluation import caption_metrics
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.training.trainer import Trainer

BATCH = 64  # pictures or texts that go through CLIP at a time


@attrs.frozen
class Pictures(Sequence):
    """The pictures of some rows, decoded when asked for."""

    rows: Sequence

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice) -> list:
        return [self.rows[i]["image"] for i in range(len(self.rows))[places]]


def shuffled(captions: list[str]) -> list[str]:
    """Each picture's caption given to another, half of them away."""
    half = max(1, len(captions) // 2)
    return captions[half:] + captions[:half]


def evaluate(captions, references, clip: ContrastiveCLIP | None, images: mx.array | None) -> tuple[dict, list[dict]]:
    """The figures of all captions together, and those of each."""
    each = [{"cider_d": score} for score in caption_metrics.cider_d_scores(captions, references)]
    figures = caption_metrics.coco_bleu(captions, references) | {
        "rouge_l": caption_metrics.rouge_l(captions, references),
        "cider_d": caption_metrics.cider_d(captions, references),
        "exact_match": caption_metrics.exact_match(captions, references),
        "distinct_1": caption_metrics.distinct(captions, 1),
        "distinct_2": caption_metrics.distinct(captions, 2),
    }
    if clip is not None:
        scores = clip_scores(clip, images, captions, references)
        figures |= {name: float(values.mean()) for name, values in scores.items()}
        for i, row in enumerate(each):
            row |= {name: float(values[i]) for name, values in scores.items()}
    return figures, each


def require_room(clip: ContrastiveCLIP, texts: Sequence[str]) -> None:
    """Raise `UserError` where most texts do not fit into CLIP's context after the prompt: what is cut off cannot be
    judged, and a small CLIP may see the prompt alone."""
    length = clip.config.text.max_position_embeddings
    tokens = clip.tokenizer([caption_metrics.CLIP_SCORE_PROMPT + text for text in texts])["input_ids"]
    num_cut = sum(len(ids) > length for ids in tokens)
    if num_cut > len(texts) / 2:
        raise UserError(
            f"--clip reads {length} tokens: {num_cut} of {len(texts)} references do not fit after "
            f"{caption_metrics.CLIP_SCORE_PROMPT!r}; name a CLIP with a longer context, or none"
        )


def clip_scores(clip: ContrastiveCLIP, images: mx.array, captions, references) -> dict[str, mx.array]:
    """CLIPScore and RefCLIPScore of each caption, given `images` (pictures, features)."""
    most = max(map(len, references))
    filled = [text for refs in references for text in [*refs, *[""] * (most - len(refs))]]
    wanted = encode_texts(clip, filled).reshape(len(captions), most, -1)
    present = mx.arange(most) < mx.array([len(refs) for refs in references])[:, None]
    said = encode_texts(clip, captions)
    return {
        "clip_score": caption_metrics.clip_score(images, said),
        "ref_clip_score": caption_metrics.ref_clip_score(images, said, wanted, present),
    }


def encode_images(clip: ContrastiveCLIP, images: Sequence) -> mx.array:
    """Features (pictures, E)."""
    starts = range(0, len(images), BATCH)
    return _joined(clip.encode_image(clip.preprocess(images[i : i + BATCH])) for i in starts)


def encode_texts(clip: ContrastiveCLIP, texts: Sequence[str]) -> mx.array:
    """Features (texts, E), of each after CLIPScore's prompt."""
    texts = [caption_metrics.CLIP_SCORE_PROMPT + text for text in texts]
    return _joined(clip.encode_text(clip.tokenize(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH))


def _joined(parts) -> mx.array:
    done = []
    for part in parts:
        mx.eval(part)  # finish, and free, one batch before starting the next
        done.append(part)
    return mx.concatenate(done)


def perplexities(captioner: CaptioningModule, rows: Sequence, batch_size: int) -> dict[str, float]:
    """Of the first reference of each picture, and of the same text after another picture."""
    loader = Loader(
        rows=rows,
        transform=lambda row, rng: captioner.transform(row, row["captions"][0]),
        batch_size=min(batch_size, len(rows)),
        collate=captioner.collate,
    )
    means = Trainer(logger=False, enable_model_summary=False).test(captioner, dataloaders=loader)
    names = {"perplexity": "test/loss", "perplexity_shuffled": "test/loss_shuffled"}
    return {name: caption_metrics.perplexity(means[loss], 1) for name, loss in names.items()}
