"""A CLIP trained from scratch: the recipe train_clip's whole work, and the tower of a demo's captioner."""

import json
from pathlib import Path

import attrs
import mlx.core as mx
from attrs.validators import ge
from mlxmm.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    SyntheticRefresh,
    TQDMProgressBar,
)

from mlxmm import Trainer, TrainerConfig
from mlxmm.config import option, to_json
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionSource
from mlxmm.evaluation.clip import evaluate_shapes, retrieval_metrics
from mlxmm.modules.contrastive_clip import CLIPConfig, ContrastiveCLIP
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import token_length, train_tokenizer
from mlxmm.storage.atomic import write_json
from mlxmm.storage.cache import cached
from mlxmm.storage.runs import Run


def tower_or_train(config, source: CaptionSource, run: Run) -> tuple[str, dict]:
    """The tower that `config.module` names, or one trained on `data`, now or in an earlier run, with its figures."""
    if config.module.vision is not None:
        return config.module.vision, {}
    key = [*data_key(config), to_json(config.tower)]
    folder = cached("tower", key, lambda to: _train_tower(config, source, run, to))
    return str(folder), read_figures(folder, "zero_shot/accuracy")


def data_key(config) -> list:
    return [to_json(config.data), config.seed]


def _train_tower(config, source: CaptionSource, run: Run, folder: Path) -> None:
    clip, figures = train(config.tower, source, run.subrun("tower"), config.seed)
    clip.save_pretrained(folder)
    write_json(folder / "figures.json", figures)


def read_figures(folder: Path, *names: str) -> dict:
    figures = json.loads((folder / "figures.json").read_text())
    return {name: figures[name] for name in names if name in figures}


# Pictures on light ground: zero about where the ground is.
LIGHT_MEAN, UNIT_STD = (0.88, 0.88, 0.88), (1.0, 1.0, 1.0)
TRAINING_SETTINGS = ("chunk_size", "patch_dropout", "locked", "optimizer")  # settings of a pretrained CLIP too


@attrs.frozen(kw_only=True)
class TowerConfig:
    """A CLIP and how long it is trained."""

    module: CLIPConfig = CLIPConfig()
    pretrained: str | None = option(None, "CLIP or SigLIP to go on from: folder or Hub id; none: fresh weights")
    vocab_size: int = option(2_000, "most tokens of the tokenizer that is trained on the captions", ge(1))
    max_tokens: int = option(77, "longest text; less, where all captions are shorter")
    trainer: TrainerConfig = TrainerConfig(max_steps=700)


def train(config: TowerConfig, source: CaptionSource, run: Run, seed: int) -> tuple[ContrastiveCLIP, dict]:
    """Train a CLIP on `data`; returns it with the figures of the run's end."""
    clip = build(config, source, seed)
    data = CaptionData(source, transform=clip.transform)
    refresh = [SyntheticRefresh(source.fresh_rows)] if source.is_synthetic else []
    trainer = Trainer(
        attrs.evolve(config.trainer, seed=seed, default_root_dir=run.folder),
        callbacks=[
            *refresh,
            ModelSummary(),
            LearningRateMonitor(),
            TQDMProgressBar("tower"),
            # The loss may rise with the temperature while more and more pictures find their captions.
            ModelCheckpoint(every_n_train_steps=200, monitor="val/accuracy", mode="max"),
        ],
    )
    trainer.fit(clip, data, ckpt_path=run.ckpt_path)
    figures = dict(trainer.callback_metrics)
    if source.is_synthetic and run.is_global_zero:
        figures |= evaluate_shapes(clip, source, seed) | retrieval_metrics(clip, source.rows["test"])
    return clip, figures


def build(config: TowerConfig, source: CaptionSource, seed: int) -> ContrastiveCLIP:
    """A CLIP with fresh weights, and a tokenizer trained on the captions of `data`; or one that is there already,
    for pictures of the size that the configuration says."""
    size = config.module.vision.image_size
    if config.pretrained is not None:
        clip = ContrastiveCLIP.from_pretrained(config.pretrained)
        clip.resize_images(size)
        clip.config = attrs.evolve(clip.config, **{name: getattr(config.module, name) for name in TRAINING_SETTINGS})
        return clip
    captions = source.sample_captions()
    tokenizer = train_tokenizer(captions, config.vocab_size, adds_start_and_end=True)
    text = attrs.evolve(
        config.module.text,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=min(config.max_tokens, token_length(tokenizer, captions)),
    )
    processor = ImageProcessor.square(size)
    if source.is_synthetic:
        processor = attrs.evolve(processor, mean=LIGHT_MEAN, std=UNIT_STD)
    mx.random.seed(seed)
    return ContrastiveCLIP(attrs.evolve(config.module, text=text), tokenizer, processor)
