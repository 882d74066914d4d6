"""Teach Qwen3 to read what a CLIP tower sees: the projector first, then the language model's last layers or adapters.

    python -m recipes.align_qwen3
    python -m recipes.align_qwen3 --module.vision openai/clip-vit-base-patch32 --module.lm Qwen/Qwen3-0.6B-Base \\
        --data.source pictures.parquet

Without flags it draws its own pictures and trains a small tower and a small Qwen3 first; both are kept in a cache.
With `--push-to user/name` the trained captioner goes to the Hub, as a LLaVA that transformers loads.
"""

import shutil

import attrs
import mlx.core as mx
from attrs.validators import ge

from mlxmm import TrainerConfig
from mlxmm.callbacks import FreezeSchedule
from mlxmm.cli import run_recipe
from mlxmm.compute.quantized import is_quantized
from mlxmm.config import Preset, internal, option, section
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.export import llava
from mlxmm.modules.memory_plan import plan_memory
from mlxmm.modules.qwen3_aligner import Qwen3Aligner, Qwen3AlignerConfig
from mlxmm.networks.adapters import LoRAConfig
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.tokenizers import START, load_tokenizer
from mlxmm.storage.hub import check_upload, local_folder, upload
from mlxmm.storage.runs import Run, TrainingRunConfig, open_run
from mlxmm.training.trainable import match_parameters

from .parts.captioning import evaluate, fit, longest_caption, report_truncation
from .parts.language_model import LanguageModelConfig, language_model_or_train
from .parts.named_parts import check_parts
from .parts.tower import TowerConfig, tower_or_train


@attrs.frozen(kw_only=True)
class Config(TrainingRunConfig):
    """Tower, projector and language model; data; what is trained when."""

    data: CaptionDataConfig = section(CaptionDataConfig())
    module: Qwen3AlignerConfig = section(Qwen3AlignerConfig())
    trainer: TrainerConfig = section(
        TrainerConfig(max_steps=1_170, val_check_interval=390), without=("seed", "default_root_dir")
    )
    unfreeze_step: int = option(120, "update at which LoRA adapters, or the last layers, are unfrozen", ge(0))
    unfreeze_layers: int = option(2, "how many of the language model's last layers are unfrozen", ge(1))
    checkpoint_every: int = option(200, "updates between checkpoints", ge(1))
    max_test: int = option(1_000, "most pictures of each test split to caption", ge(1))
    cached_features: bool = option(False, "compute the frozen tower's features once, and keep them on disk")
    push_to: str | None = option(None, "Hub repository, user/name, to upload the captioner to; created if missing")
    public: bool = option(False, "make the repository that --push-to creates public")
    tower: TowerConfig = internal(TowerConfig())
    language_model: LanguageModelConfig = internal(LanguageModelConfig())


# 48 pictures an update. What a batch of 16 needs is in docs/on-a-mac.md; the names say for which machine.
FLICKR30K = Config(
    data=CaptionDataConfig(
        source="nlphuji/flickr30k", revision="refs/convert/parquet", split_column="split", batch_size=16
    ),
    module=Qwen3AlignerConfig(
        vision="openai/clip-vit-base-patch32",
        lm="Qwen/Qwen3-0.6B-Base",
        layer=-2,
        projector_width=1_024,
        max_new_tokens=32,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, weight_decay=0.0),
    ),
    trainer=TrainerConfig(
        max_steps=6_000,
        val_check_interval=600,
        accumulate_grad_batches=3,
        precision="bf16-mixed",
        gradient_checkpointing=True,
    ),
    unfreeze_step=1_200,
    checkpoint_every=600,
    cached_features=True,
)
FLICKR30K_LORA = attrs.evolve(FLICKR30K, module=attrs.evolve(FLICKR30K.module, lora=LoRAConfig(rank=8)))
FLICKR30K_QLORA = attrs.evolve(
    FLICKR30K_LORA,
    data=attrs.evolve(FLICKR30K.data, batch_size=8),
    module=attrs.evolve(FLICKR30K_LORA.module, lm_bits=4),
    trainer=attrs.evolve(FLICKR30K.trainer, accumulate_grad_batches=6),
)
FLICKR30K_32GB = attrs.evolve(
    FLICKR30K,
    data=attrs.evolve(FLICKR30K.data, batch_size=48),
    trainer=attrs.evolve(FLICKR30K.trainer, accumulate_grad_batches=1, gradient_checkpointing=False),
)
TINY = Config(
    data=CaptionDataConfig(batch_size=16, shapes=ShapesConfig(num_train=64, num_val=16, num_test=8)),
    trainer=TrainerConfig(max_steps=8, val_check_interval=4, log_every_n_steps=2),
    unfreeze_step=4,
    checkpoint_every=3,
    tower=TowerConfig(trainer=TrainerConfig(max_steps=4)),
    language_model=LanguageModelConfig(trainer=TrainerConfig(max_steps=4)),
)
PRESETS = {
    "default": Preset("the demo: drawn pictures, a small tower and a small Qwen3, a few minutes", Config()),
    "tiny": Preset("all of the demo's steps in seconds, to try things out; the captions are useless", TINY),
    "flickr30k": Preset(
        "CLIP ViT-B/32 and Qwen3-0.6B on Flickr30k; the last two layers are unfrozen; for 16 GB", FLICKR30K
    ),
    "flickr30k-lora": Preset("the same with LoRA adapters in all layers; for 16 GB", FLICKR30K_LORA),
    "flickr30k-qlora": Preset("adapters on a language model of 4 bits; for 8 GB", FLICKR30K_QLORA),
    "flickr30k-32gb": Preset("as flickr30k, in larger batches and nothing computed twice; for 32 GB", FLICKR30K_32GB),
}


def main(config: Config) -> None:
    if config.push_to and collectives.rank() == 0:
        check_upload(config.push_to)  # hours before it is needed
    if config.data.streaming and config.module.lm is None:
        raise UserError("a language model is not trained on a stream: name one with --module.lm")
    with open_run(config, "align_qwen3") as run:
        check_parts(tower=config.module.vision, language_model=config.module.lm, clip=config.tower.pretrained)
        source = open_source(config.data, config.seed)
        aligner = build(config, source, run)
        if config.push_to:
            llava.check(aligner)
        stages = {0: "projector", config.unfreeze_step: ("projector", unfrozen_part(config, aligner))}
        report_memory(config, aligner, source, run)
        fit(config, aligner, source, run, "align", FreezeSchedule(stages, unit="step"))
        if run.is_global_zero:
            evaluate(config, aligner, source, run)
    if config.push_to and run.is_global_zero:  # once the run's summary is written
        push(config, aligner, run)


def build(config: Config, source: CaptionSource, run: Run) -> Qwen3Aligner:
    """The aligner of the parts that `config.module` names; those it does not name are trained on `source`."""
    vision, metrics = tower_or_train(config, source, run)
    run.report(metrics)
    prompt = config.module.prompt or (START if config.module.lm is None else "")
    lm = language_model_or_train(config, source, run)
    module = attrs.evolve(config.module, vision=vision, lm=lm, prompt=prompt)
    if module.max_new_tokens == 0:
        module = attrs.evolve(module, max_new_tokens=longest_caption(load_tokenizer(local_folder(lm)), source))
    mx.random.seed(config.seed)
    aligner = Qwen3Aligner.from_parts(module)
    report_truncation(aligner, source, run)
    return aligner


def unfrozen_part(config: Config, aligner: Qwen3Aligner) -> str:
    """What of the language model is trained, as `FreezeSchedule` names it."""
    if config.module.lora.rank:
        return "lora"
    if any(map(is_quantized, aligner.language_model.modules())):
        raise UserError(
            "layers of a quantized language model cannot be trained: set --module.lora.rank, to 8 for example"
        )
    return f"language_model.model.layers[-{config.unfreeze_layers}:]"


def report_memory(config: Config, aligner: Qwen3Aligner, source: CaptionSource, run: Run) -> None:
    """Print what the run needs of memory and disk, and where this machine has less."""
    trained = {*match_parameters(aligner, "projector"), *match_parameters(aligner, unfrozen_part(config, aligner))}
    num_cached = sum(len(source.rows[split]) for split in ("train", "val")) if config.cached_features else 0
    plan = plan_memory(aligner, trained, config.trainer, batch_size=config.data.batch_size, num_cached_rows=num_cached)
    run.print(str(plan))
    for shortage in plan.shortages(run.folder):
        run.print(f"warning: {shortage}; see docs/on-a-mac.md for smaller presets")


def push(config: Config, aligner: Qwen3Aligner, run: Run) -> None:
    """Export the captioner into the run's folder, with the metrics in its card, and upload that."""
    folder = run.folder / "export"
    if folder.exists():  # of this run, before it was resumed
        shutil.rmtree(folder)
    aligner.save_pretrained(folder, run.metrics)
    run.print(f"uploaded: {upload(folder, config.push_to, public=config.public)}")


if __name__ == "__main__":
    run_recipe("align_qwen3", main, PRESETS)
