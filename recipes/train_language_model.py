"""Train a small Qwen3 as a language model on the text of a data set: captions, and for `shapes` its whole grammar.

python -m recipes.train_language_model
"""

import attrs
import mlx.core as mx
from attrs.validators import ge

from callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, TQDMProgressBar
from mlxmm import Trainer, TrainerConfig
from mlxmm.config import option, run_recipe
from mlxmm.data.datamodule import CaptionData, CaptionDataConfig
from mlxmm.data.loader import Loader
from mlxmm.data.tokenizers import token_length, train_tokenizer
from mlxmm.modules.language_model import TextModel, TextModelConfig
from mlxmm.run import Run, RunConfig, open_run, read_saved_config


@attrs.frozen(kw_only=True)
class LanguageModelConfig:
    """A small Qwen3 and how long it is trained."""

    module: TextModelConfig = TextModelConfig()
    vocab_size: int = option(2_000, "most tokens of the tokenizer that is trained on the text", ge(1))
    batch_size: int = option(64, "texts in a batch")
    trainer: TrainerConfig = TrainerConfig(max_steps=250)


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """A small Qwen3 from scratch."""

    data: CaptionDataConfig = CaptionDataConfig()
    lm: LanguageModelConfig = LanguageModelConfig()


def main(config: Config) -> None:
    run = open_run(config, "train_language_model")
    model, figures = train(config.lm, CaptionData(config.data, config.seed), run, config.seed)
    if run.is_global_zero:
        model.save_pretrained(run.folder / "model")
    run.write_summary(figures)
    run.print("\n".join(f"{name:<24}{value:.4f}" for name, value in figures.items()))
    run.print(f"model: {run.folder / 'model'}\ncurves: tensorboard --logdir {run.folder}")


def train(config: LanguageModelConfig, data: CaptionData, run: Run, seed: int) -> tuple[TextModel, dict]:
    """Train a language model on the text of `data`; returns it with the figures of the run's end."""
    data.setup()
    sample = [f"{notes} {caption}" for notes, caption in data.sample_texts()]
    tokenizer = train_tokenizer(sample, config.vocab_size)
    longest = token_length(tokenizer, sample) + 2  # start and end
    mx.random.seed(seed)
    model = TextModel(attrs.evolve(config.module, max_tokens=longest), tokenizer)
    loader = Loader(
        rows=data.texts(),
        encode=lambda text, rng: model.encode(text),
        batch_size=config.batch_size,
        seed=seed,
        shuffle=True,
        drop_last=True,
    )
    trainer = Trainer(
        attrs.evolve(config.trainer, seed=seed, default_root_dir=run.folder),
        callbacks=[
            ModelSummary(),
            LearningRateMonitor(),
            TQDMProgressBar("language model"),
            ModelCheckpoint(every_n_train_steps=200),
        ],
    )
    trainer.fit(model, train_dataloaders=loader, ckpt_path=run.ckpt_path)
    return model, dict(trainer.callback_metrics)


if __name__ == "__main__":
    run_recipe(main, {"default": Config()}, read_saved_config(Config, "train_language_model"))
