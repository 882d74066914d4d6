"""Train CLIP from scratch on pictures with captions; tiny by default.

python -m recipes.train_clip
python -m recipes.train_clip --data.source pictures.parquet --trainer.max-steps 2000
"""

import attrs
import mlx.core as mx

from callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, TQDMProgressBar
from mlxmm import Trainer, TrainerConfig
from mlxmm.config import option, run_recipe
from mlxmm.data.datamodule import CaptionData, CaptionDataConfig
from mlxmm.data.images import ImageProcessor
from mlxmm.data.tokenizers import token_length, train_tokenizer
from mlxmm.modules.contrastive_clip import CLIPConfig, ContrastiveCLIP
from mlxmm.run import Run, RunConfig, open_run, read_saved_config
from recipes.evaluate_clip import judge_shapes, retrieval_figures, table

# Pictures on light ground: zero about where the ground is.
LIGHT_MEAN, UNIT_STD = (0.88, 0.88, 0.88), (1.0, 1.0, 1.0)


@attrs.frozen(kw_only=True)
class TowerConfig:
    """A CLIP and how long it is trained."""

    module: CLIPConfig = CLIPConfig()
    vocab_size: int = option(2_000, "most tokens of the tokenizer that is trained on the captions")
    trainer: TrainerConfig = TrainerConfig(max_steps=700)


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """CLIP from scratch."""

    data: CaptionDataConfig = CaptionDataConfig()
    tower: TowerConfig = TowerConfig()


def main(config: Config) -> None:
    run = open_run(config, "train_clip")
    data = CaptionData(config.data, config.seed)
    clip, figures = train(config.tower, data, run, config.seed)
    clip.save_pretrained(run.folder / "model")
    run.write_summary(figures)
    print(table(figures))
    print(f"model: {run.folder / 'model'}\ncurves: tensorboard --logdir {run.folder}")


def train(config: TowerConfig, data: CaptionData, run: Run, seed: int) -> tuple[ContrastiveCLIP, dict]:
    """Train a CLIP on `data`; returns it with the figures of the run's end."""
    data.setup()
    clip = build(config, data, seed)
    data.encode = clip.encode
    trainer = Trainer(
        attrs.evolve(config.trainer, seed=seed, default_root_dir=run.folder),
        callbacks=[
            ModelSummary(),
            LearningRateMonitor(),
            TQDMProgressBar("tower"),
            ModelCheckpoint(every_n_train_steps=200),
        ],
    )
    trainer.fit(clip, data, ckpt_path=run.ckpt_path)
    figures = dict(trainer.callback_metrics)
    if data.is_synthetic:
        figures |= judge_shapes(clip, data, seed) | retrieval_figures(clip, data.rows["test"])
    return clip, figures


def build(config: TowerConfig, data: CaptionData, seed: int) -> ContrastiveCLIP:
    """A CLIP with fresh weights, and a tokenizer trained on the captions of `data`."""
    captions = [caption for _, caption in data.sample_texts()]
    tokenizer = train_tokenizer(captions, config.vocab_size, adds_start_and_end=True)
    text = attrs.evolve(
        config.module.text,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=token_length(tokenizer, captions),
    )
    size = config.module.vision.image_size
    processor = ImageProcessor(image_size=size, resize=size, mean=LIGHT_MEAN, std=UNIT_STD)
    mx.random.seed(seed)
    return ContrastiveCLIP(attrs.evolve(config.module, text=text), tokenizer, processor)


if __name__ == "__main__":
    run_recipe(main, {"default": Config()}, read_saved_config(Config, "train_clip"))
