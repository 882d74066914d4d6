"""Train CLIP from scratch on pictures with captions; tiny by default.

python -m recipes.train_clip
python -m recipes.train_clip --data.source pictures.parquet --tower.trainer.max-steps 2000
python -m recipes.train_clip --preset vit-b-32 --data.source pictures.parquet --data.batch-size 256
"""

import attrs
import mlx.core as mx
from attrs.validators import ge

from callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, SyntheticRefresh, TQDMProgressBar
from mlxmm import Trainer, TrainerConfig
from mlxmm.config import option, run_recipe
from mlxmm.data.datamodule import CaptionData, CaptionDataConfig
from mlxmm.data.images import ImageProcessor
from mlxmm.data.tokenizers import token_length, train_tokenizer
from mlxmm.modules.contrastive_clip import CLIPConfig, ContrastiveCLIP
from mlxmm.networks.towers import TextConfig, VisionConfig
from mlxmm.optimizers import OptimizerConfig
from mlxmm.run import Run, RunConfig, check_free, open_run, read_saved_config
from recipes.evaluate_clip import judge_shapes, retrieval_figures, table

# Pictures on light ground: zero about where the ground is.
LIGHT_MEAN, UNIT_STD = (0.88, 0.88, 0.88), (1.0, 1.0, 1.0)
HOW_TRAINED = ("chunk_size", "patch_dropout", "locked", "optimizer")  # settings of a pretrained CLIP too


@attrs.frozen(kw_only=True)
class TowerConfig:
    """A CLIP and how long it is trained."""

    module: CLIPConfig = CLIPConfig()
    pretrained: str | None = option(None, "CLIP or SigLIP to go on from: folder or Hub id; none: fresh weights")
    vocab_size: int = option(2_000, "most tokens of the tokenizer that is trained on the captions", ge(1))
    max_tokens: int = option(77, "longest text; less, where all captions are shorter")
    trainer: TrainerConfig = TrainerConfig(max_steps=700)


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """CLIP from scratch."""

    data: CaptionDataConfig = CaptionDataConfig()
    tower: TowerConfig = TowerConfig(trainer=TrainerConfig(max_steps=1_000))


def paper_preset(
    learning_rate: float, patch_size: int, vision: tuple, text: tuple, *, image_size: int = 224, epochs: int = 32
) -> Config:
    """A row of the CLIP paper's table 20, with what is common to all rows (table 18 and section 2.5).

    `vision` and `text` are layers, width, heads; the text tower's width is the shared space's too.
    """
    module = CLIPConfig(
        vision=VisionConfig(image_size=image_size, patch_size=patch_size, **_sizes(*vision)),
        text=TextConfig(vocab_size=49_408, max_position_embeddings=77, **_sizes(*text)),
        projection_dim=text[1],
        initialization="openai",
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, warmup_steps=2_000, weight_decay=0.2, beta1=0.9, beta2=0.98, eps=1e-6
        ),
    )
    trainer = TrainerConfig(
        max_epochs=epochs, gradient_clip_val=None, precision="bf16-mixed", gradient_checkpointing=True
    )
    tower = TowerConfig(module=module, vocab_size=49_408, max_tokens=77, trainer=trainer)
    return Config(data=CaptionDataConfig(batch_size=32_768), tower=tower)


def _sizes(layers: int, width: int, heads: int) -> dict:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return sizes | {"intermediate_size": 4 * width}


BASE, LARGE = (12, 768, 12), (24, 1_024, 16)
PRESETS = {
    "default": Config(),
    "vit-b-32": paper_preset(5e-4, 32, vision=BASE, text=(12, 512, 8)),
    "vit-b-16": paper_preset(5e-4, 16, vision=BASE, text=(12, 512, 8)),
    "vit-l-14": paper_preset(4e-4, 14, vision=LARGE, text=(12, 768, 12)),
    # One epoch more, with --tower.pretrained naming a ViT-L/14.
    "vit-l-14-336px": paper_preset(2e-5, 14, vision=LARGE, text=(12, 768, 12), image_size=336, epochs=1),
}


def main(config: Config) -> None:
    check_free(config)
    data = CaptionData(config.data, config.seed)
    data.setup()
    run = open_run(config, "train_clip")
    clip, figures = train(config.tower, data, run, config.seed)
    if run.is_global_zero:
        clip.save_pretrained(run.folder / "model")
    run.write_summary(figures)
    run.print(table(figures))
    run.print(f"model: {run.folder / 'model'}\ncurves: tensorboard --logdir {run.folder}")


def train(config: TowerConfig, data: CaptionData, run: Run, seed: int) -> tuple[ContrastiveCLIP, dict]:
    """Train a CLIP on `data`; returns it with the figures of the run's end."""
    data.setup()
    clip = build(config, data, seed)
    data.encode = clip.encode
    refresh = [SyntheticRefresh(data.fresh_rows)] if data.is_synthetic else []
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
    if data.is_synthetic and run.is_global_zero:
        figures |= judge_shapes(clip, data, seed) | retrieval_figures(clip, data.rows["test"])
    return clip, figures


def build(config: TowerConfig, data: CaptionData, seed: int) -> ContrastiveCLIP:
    """A CLIP with fresh weights, and a tokenizer trained on the captions of `data`; or one that is there already,
    for pictures of the size that the configuration says."""
    size = config.module.vision.image_size
    if config.pretrained is not None:
        clip = ContrastiveCLIP.from_pretrained(config.pretrained)
        clip.resize_images(size)
        clip.config = attrs.evolve(clip.config, **{name: getattr(config.module, name) for name in HOW_TRAINED})
        return clip
    captions = [caption for _, caption in data.sample_texts()]
    tokenizer = train_tokenizer(captions, config.vocab_size, adds_start_and_end=True)
    text = attrs.evolve(
        config.module.text,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=min(config.max_tokens, token_length(tokenizer, captions)),
    )
    processor = ImageProcessor.square(size)
    if data.is_synthetic:
        processor = attrs.evolve(processor, mean=LIGHT_MEAN, std=UNIT_STD)
    mx.random.seed(seed)
    return ContrastiveCLIP(attrs.evolve(config.module, text=text), tokenizer, processor)


if __name__ == "__main__":
    run_recipe(main, PRESETS, read_saved_config(Config, "train_clip"))
