"""Judge a captioner over a whole split: one caption a picture against all its references, and against others'.

    python -m recipes.evaluate_captions --module runs/align_qwen3/mine/checkpoints/best --data.source pictures.parquet

Writes summary.json with all figures and captions.jsonl with every caption. Figures that end in "_shuffled" are the
control: the same captions held against other pictures.
"""

import json
from collections.abc import Sequence

import attrs
import mlx.core as mx

from mlxmm import Trainer, metrics
from mlxmm.config import UserError, option, run_recipe
from mlxmm.data.datamodule import CaptionData, CaptionDataConfig
from mlxmm.data.loader import Loader
from mlxmm.files import write_text
from mlxmm.generate import GenerationConfig
from mlxmm.modules.captioner import Captioner
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.modules.loading import load_captioner
from mlxmm.run import RunConfig, open_run

BATCH = 64  # pictures or texts that go through CLIP at a time


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """Which model, which pictures, and how to choose words."""

    module: str | None = option(None, "checkpoint or folder of a Qwen3Aligner or CaptionDecoder, or its Hub id")
    clip: str | None = option(None, "CLIP folder or Hub id for CLIPScore and RefCLIPScore; none: without them")
    split: str = option("test", "part of the data to judge on")
    data: CaptionDataConfig = CaptionDataConfig()
    generation: GenerationConfig = GenerationConfig()


@attrs.frozen
class Pictures(Sequence):
    """The pictures of some rows, decoded when asked for."""

    rows: Sequence

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice) -> list:
        return [self.rows[i]["image"] for i in range(len(self.rows))[places]]


def main(config: Config) -> None:
    if config.module is None:
        raise UserError("--module is missing: name a checkpoint, for example runs/align_qwen3/mine/checkpoints/best")
    captioner = load_captioner(config.module)
    clip = None if config.clip is None else ContrastiveCLIP.from_pretrained(config.clip)
    data = CaptionData(config.data, config.seed)
    data.setup()
    data.check_split(config.split)
    rows = data.rows[config.split]
    references = [rows[i]["captions"] for i in range(len(rows))]
    if clip is not None:
        require_room(clip, [text for refs in references for text in refs])
    run = open_run(config, "evaluate_captions")
    captions = captioner.caption(Pictures(rows), **attrs.asdict(config.generation))
    images = None if clip is None else encode_images(clip, Pictures(rows))
    figures, each = judge(captions, references, clip, images)
    control, _ = judge(shuffled(captions), references, clip, images)
    figures |= {f"{name}_shuffled": value for name, value in control.items() if not name.startswith("distinct")}
    figures |= perplexities(captioner, rows, config.data.batch_size)
    lines = [
        json.dumps({"id": rows[i]["id"], "caption": captions[i], "references": references[i]} | each[i])
        for i in range(len(rows))
    ]
    write_text(run.folder / "captions.jsonl", "\n".join(lines) + "\n")
    run.write_summary({"pictures": len(rows)} | figures)
    print("\n".join(f"{name:<28}{value:>10.4f}" for name, value in figures.items()))
    print(f"captions: {run.folder / 'captions.jsonl'}")


def shuffled(captions: list[str]) -> list[str]:
    """Each picture's caption given to another, half of them away."""
    half = max(1, len(captions) // 2)
    return captions[half:] + captions[:half]


def judge(captions, references, clip: ContrastiveCLIP | None, images: mx.array | None) -> tuple[dict, list[dict]]:
    """The figures of all captions together, and those of each."""
    each = [{"cider_d": score} for score in metrics.cider_d_scores(captions, references)]
    figures = metrics.coco_bleu(captions, references) | {
        "rouge_l": metrics.rouge_l(captions, references),
        "cider_d": metrics.cider_d(captions, references),
        "exact_match": metrics.exact_match(captions, references),
        "distinct_1": metrics.distinct(captions, 1),
        "distinct_2": metrics.distinct(captions, 2),
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
    tokens = clip.tokenizer([metrics.CLIP_SCORE_PROMPT + text for text in texts])["input_ids"]
    num_cut = sum(len(ids) > length for ids in tokens)
    if num_cut > len(texts) / 2:
        raise UserError(
            f"--clip reads {length} tokens: {num_cut} of {len(texts)} references do not fit after "
            f"{metrics.CLIP_SCORE_PROMPT!r}; name a CLIP with a longer context, or none"
        )


def clip_scores(clip: ContrastiveCLIP, images: mx.array, captions, references) -> dict[str, mx.array]:
    """CLIPScore and RefCLIPScore of each caption, given `images` (pictures, features)."""
    most = max(map(len, references))
    filled = [text for refs in references for text in [*refs, *[""] * (most - len(refs))]]
    wanted = encode_texts(clip, filled).reshape(len(captions), most, -1)
    present = mx.arange(most) < mx.array([len(refs) for refs in references])[:, None]
    said = encode_texts(clip, captions)
    return {
        "clip_score": metrics.clip_score(images, said),
        "ref_clip_score": metrics.ref_clip_score(images, said, wanted, present),
    }


def encode_images(clip: ContrastiveCLIP, images: Sequence) -> mx.array:
    """Features (pictures, E)."""
    starts = range(0, len(images), BATCH)
    return _joined(clip.encode_image(clip.preprocess(images[i : i + BATCH])) for i in starts)


def encode_texts(clip: ContrastiveCLIP, texts: Sequence[str]) -> mx.array:
    """Features (texts, E), of each after CLIPScore's prompt."""
    texts = [metrics.CLIP_SCORE_PROMPT + text for text in texts]
    return _joined(clip.encode_text(clip.tokenize(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH))


def _joined(parts) -> mx.array:
    done = []
    for part in parts:
        mx.eval(part)  # finish, and free, one batch before starting the next
        done.append(part)
    return mx.concatenate(done)


def perplexities(captioner: Captioner, rows: Sequence, batch_size: int) -> dict[str, float]:
    """Of the first reference of each picture, and of the same text after another picture."""
    loader = Loader(
        rows=rows,
        encode=lambda row, rng: captioner.encode(row, row["captions"][0]),
        batch_size=min(batch_size, len(rows)),
        complete_batch=captioner.complete_batch,
    )
    means = Trainer(logger=False, enable_model_summary=False).test(captioner, dataloaders=loader)
    names = {"perplexity": "test/loss", "perplexity_shuffled": "test/loss_shuffled"}
    return {name: metrics.perplexity(means[loss], 1) for name, loss in names.items()}


if __name__ == "__main__":
    run_recipe(main, {"default": Config()})
