"""Teach Qwen3 to read what a CLIP tower sees: the projector first, then the language model's last two layers, or
with --module.lora.rank 8 the adapters of all its layers.

    python -m recipes.align_qwen3
    python -m recipes.align_qwen3 --module.vision openai/clip-vit-base-patch32 --module.lm Qwen/Qwen3-0.6B-Base \\
        --data.source pictures.parquet

Without flags it draws its own pictures and trains a small tower and a small Qwen3 first; both are kept in a cache.
With `--push-to user/name` the trained captioner goes to the Hub, as a LLaVA that transformers loads.
"""

import shutil
import time
from pathlib import Path

import attrs
import mlx.core as mx
from attrs.validators import ge
from mlxmm.callbacks import (
    FreezeSchedule,
)

from mlxmm import TrainerConfig
from mlxmm.cli import read_saved_config, run_recipe
from mlxmm.compute.quantized import is_quantized
from mlxmm.config import option, to_json
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.export import llava
from mlxmm.modules.qwen3_aligner import Qwen3Aligner, Qwen3AlignerConfig
from mlxmm.networks.adapters import LoRAConfig
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.tokenizers import START, load_tokenizer
from mlxmm.storage.atomic import write_json
from mlxmm.storage.cache import cached
from mlxmm.storage.hub import check_upload, local_folder, upload
from mlxmm.storage.runs import Run, RunConfig, check_free, open_run

from .parts.captioning import evaluate, fit, longest_caption, report, report_truncation
from .parts.language_model import LanguageModelConfig
from .parts.language_model import train as train_language_model
from .parts.tower import TowerConfig, data_key, tower_or_train


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """Tower, projector and language model; data; when to open what."""

    data: CaptionDataConfig = CaptionDataConfig()
    module: Qwen3AlignerConfig = Qwen3AlignerConfig()
    trainer: TrainerConfig = TrainerConfig(max_steps=1_170, val_check_interval=390)
    unfreeze_step: int = option(
        120, "update from which the language model's adapters, if any, or its last layers are trained too", ge(0)
    )
    unfreeze_layers: int = option(2, "how many of its last layers", ge(1))
    checkpoint_every: int = option(200, "updates between checkpoints", ge(1))
    max_test: int = option(1_000, "most pictures of each test part to caption", ge(1))
    push_to: str | None = option(None, "repository of the Hub, user/name, for the captioner; made where there is none")
    public: bool = option(False, "whether the repository that --push-to makes is public")
    tower: TowerConfig = TowerConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()


FLICKR30K = Config(
    data=CaptionDataConfig(
        source="nlphuji/flickr30k", revision="refs/convert/parquet", split_column="split", batch_size=48
    ),
    module=Qwen3AlignerConfig(
        vision="openai/clip-vit-base-patch32",
        lm="Qwen/Qwen3-0.6B-Base",
        layer=-2,
        projector_width=1_024,
        max_new_tokens=32,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, weight_decay=0.0),
    ),
    trainer=TrainerConfig(max_steps=6_000, val_check_interval=600),
    unfreeze_step=1_200,
    checkpoint_every=600,
)
FLICKR30K_LORA = attrs.evolve(FLICKR30K, module=attrs.evolve(FLICKR30K.module, lora=LoRAConfig(rank=8)))
PRESETS = {"default": Config(), "flickr30k": FLICKR30K, "flickr30k-lora": FLICKR30K_LORA}


def main(config: Config) -> None:
    start = time.perf_counter()
    if config.push_to and collectives.rank() == 0:
        check_upload(config.push_to)  # hours before it is needed
    check_free(config)
    collectives.check_strategy(config.trainer.strategy)
    if config.data.streaming and config.module.lm is None:
        raise UserError("a language model is not trained on a stream: name one with --module.lm")
    source = open_source(config.data, config.seed)
    run = open_run(config, "align_qwen3")
    aligner, figures = build(config, source, run)
    if config.push_to:
        llava.check(aligner)
    figures |= align(config, aligner, source, run)
    if run.is_global_zero:
        figures |= evaluate(config, aligner, source, run)
    report(figures | {"seconds": time.perf_counter() - start}, source, run)
    if config.push_to and run.is_global_zero:
        push(config, aligner, figures, run)


def build(config: Config, source: CaptionSource, run: Run) -> tuple[Qwen3Aligner, dict]:
    """The aligner of the parts that `config.module` names; those it does not name are trained on `data`."""
    vision, figures = tower_or_train(config, source, run)
    module = attrs.evolve(config.module, vision=vision)
    if module.lm is None:
        key = [*data_key(config), to_json(config.language_model)]
        folder = cached("language-model", key, lambda to: _train_lm(config, source, run, to))
        module = attrs.evolve(module, lm=str(folder), prompt=module.prompt or START)
    if module.max_new_tokens == 0:
        length = longest_caption(load_tokenizer(local_folder(module.lm)), source)
        module = attrs.evolve(module, max_new_tokens=length)
    mx.random.seed(config.seed)
    aligner = Qwen3Aligner.from_parts(module)
    report_truncation(aligner, source, run)
    return aligner, figures


def align(config: Config, aligner: Qwen3Aligner, source: CaptionSource, run: Run) -> dict:
    """Train the projector, then adapters or the last layers too; returns the figures of the run's end."""
    schedule = FreezeSchedule(
        {0: "projector", config.unfreeze_step: ("projector", unfrozen_part(config, aligner))}, unit="step"
    )
    return fit(config, aligner, source, run, "align", schedule)


def unfrozen_part(config: Config, aligner: Qwen3Aligner) -> str:
    """What of the language model is trained, as `FreezeSchedule` names it."""
    if config.module.lora.rank:
        return "lora"
    if any(map(is_quantized, aligner.language_model.modules())):
        raise UserError(
            "layers of a quantized language model cannot be opened: set --module.lora.rank, to 8 for example"
        )
    return f"language_model.model.layers[-{config.unfreeze_layers}:]"


def push(config: Config, aligner: Qwen3Aligner, figures: dict, run: Run) -> None:
    """Write the captioner with its `figures` into the run's folder, and upload that."""
    folder = run.folder / "export"
    if folder.exists():  # of this run, before it was resumed
        shutil.rmtree(folder)
    aligner.save_pretrained(folder, figures)
    run.print(f"uploaded: {upload(folder, config.push_to, public=config.public)}")


def _train_lm(config: Config, source: CaptionSource, run: Run, folder: Path) -> None:
    model, figures = train_language_model(config.language_model, source, run.subrun("language_model"), config.seed)
    model.save_pretrained(folder)
    write_json(folder / "figures.json", figures)


if __name__ == "__main__":
    run_recipe(main, PRESETS, read_saved_config(Config, "align_qwen3"))
