"""A small Qwen3 trained from scratch on text."""

import attrs
import mlx.core as mx
from attrs.validators import ge
from mlxmm.callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary, TQDMProgressBar

from mlxmm import Trainer, TrainerConfig
from mlxmm.config import option
from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.loader import Loader
from mlxmm.modules.text_model import TextModel, TextModelConfig
from mlxmm.preprocessing.tokenizers import token_length, train_tokenizer
from mlxmm.storage.runs import Run


@attrs.frozen(kw_only=True)
class LanguageModelConfig:
    """A small Qwen3 and how long it is trained."""

    module: TextModelConfig = TextModelConfig()
    vocab_size: int = option(2_000, "most tokens of the tokenizer that is trained on the text", ge(1))
    batch_size: int = option(64, "texts in a batch")
    trainer: TrainerConfig = TrainerConfig(max_steps=250)


def train(config: LanguageModelConfig, source: CaptionSource, run: Run, seed: int) -> tuple[TextModel, dict]:
    """Train a language model on the text of `data`; returns it with the figures of the run's end."""
    sample = [f"{notes} {caption}" for notes, caption in source.sample_texts()]
    tokenizer = train_tokenizer(sample, config.vocab_size)
    longest = token_length(tokenizer, sample) + 2  # start and end
    mx.random.seed(seed)
    model = TextModel(attrs.evolve(config.module, max_tokens=longest), tokenizer)
    loader = Loader(
        rows=source.texts(),
        transform=lambda text, rng: model.transform(text),
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
