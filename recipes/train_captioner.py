"""Train a caption decoder from scratch over a frozen vision tower; tiny by default.

    python -m recipes.train_captioner
    python -m recipes.train_captioner --module.decoder.reading prefix
    python -m recipes.train_captioner --module.vision openai/clip-vit-base-patch32 --module.layer -2 \\
        --data.source pictures.parquet

Without flags it draws its own pictures and trains a small tower first, which is kept in a cache.
"""

import time

import attrs
import mlx.core as mx
from attrs.validators import ge

from mlxmm import TrainerConfig
from mlxmm.cli import read_saved_config, run_recipe
from mlxmm.config import option
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.distributed import collectives
from mlxmm.modules.caption_decoder import CaptionDecoder, CaptionDecoderConfig
from mlxmm.preprocessing.tokenizers import load_tokenizer, train_tokenizer
from mlxmm.storage.hub import local_folder
from mlxmm.storage.runs import Run, RunConfig, check_free, open_run

from .parts.captioning import evaluate, fit, longest_caption, report, report_truncation
from .parts.tower import TowerConfig, tower_or_train


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """Tower and decoder; data; how long."""

    data: CaptionDataConfig = CaptionDataConfig()
    module: CaptionDecoderConfig = CaptionDecoderConfig()
    trainer: TrainerConfig = TrainerConfig(max_steps=1_400, val_check_interval=350)
    tokenizer: str | None = option(None, "folder or Hub id of a tokenizer; none: one is trained on the captions")
    vocab_size: int = option(2_000, "most tokens of a tokenizer that is trained", ge(1))
    checkpoint_every: int = option(200, "updates between checkpoints", ge(1))
    max_test: int = option(1_000, "most pictures of each test part to caption", ge(1))
    tower: TowerConfig = TowerConfig()


def main(config: Config) -> None:
    start = time.perf_counter()
    check_free(config)
    collectives.check_strategy(config.trainer.strategy)
    source = open_source(config.data, config.seed)
    run = open_run(config, "train_captioner")
    captioner, figures = build(config, source, run)
    figures |= fit(config, captioner, source, run, "captioner")
    if run.is_global_zero:
        figures |= evaluate(config, captioner, source, run)
    report(figures | {"seconds": time.perf_counter() - start}, source, run)


def build(config: Config, source: CaptionSource, run: Run) -> tuple[CaptionDecoder, dict]:
    """The tower that `config.module` names, or one trained on `data`, under a decoder with fresh weights."""
    vision, figures = tower_or_train(config, source, run)
    if config.tokenizer is None:
        tokenizer = train_tokenizer(source.sample_captions(), config.vocab_size)
    else:
        tokenizer = load_tokenizer(local_folder(config.tokenizer))
    length = config.module.max_new_tokens or longest_caption(tokenizer, source)
    mx.random.seed(config.seed)
    module = attrs.evolve(config.module, vision=vision, max_new_tokens=length)
    captioner = CaptionDecoder.from_parts(module, tokenizer)
    report_truncation(captioner, source, run)
    return captioner, figures


if __name__ == "__main__":
    run_recipe(main, {"default": Config()}, read_saved_config(Config, "train_captioner"))
