"""What an alignment trains and what that will need: for `align_qwen3`, and for the doctor, which plans its presets."""

import attrs
from attrs.validators import ge

from mlxmm import TrainerConfig
from mlxmm.compute.quantized import is_quantized
from mlxmm.config import Preset, checked, option, section
from mlxmm.data.caption_source import CaptionDataConfig
from mlxmm.errors import UserError
from mlxmm.modules.memory_plan import MemoryPlan, plan_memory
from mlxmm.modules.qwen3_aligner import Qwen3Aligner, Qwen3AlignerConfig
from mlxmm.networks.adapters import LoRAConfig
from mlxmm.optimizers import OptimizerConfig
from mlxmm.training.trainable import match_parameters


@attrs.frozen(kw_only=True, slots=False, field_transformer=checked)  # align_qwen3 derives its Config from two of these
class AlignmentConfig:
    """Tower, projector and language model; data; what is trained when."""

    data: CaptionDataConfig = section(CaptionDataConfig())
    module: Qwen3AlignerConfig = section(Qwen3AlignerConfig())
    trainer: TrainerConfig = section(
        TrainerConfig(max_steps=1_170, val_check_interval=390), without=("seed", "default_root_dir")
    )
    unfreeze_step: int = option(120, "update at which LoRA adapters, or the last layers, are unfrozen", ge(0))
    unfreeze_layers: int = option(2, "how many of the language model's last layers are unfrozen", ge(1))
    checkpoint_every: int = option(200, "updates between checkpoints", ge(1))
    cached_features: bool = option(False, "compute the frozen tower's features once, and keep them on disk")


def unfrozen_part(config: AlignmentConfig, aligner: Qwen3Aligner) -> str:
    """What of the language model is trained, as `FreezeSchedule` names it."""
    if config.module.lora.rank:
        return "lora"
    if any(map(is_quantized, aligner.language_model.modules())):
        raise UserError(
            "layers of a quantized language model cannot be trained: set --module.lora.rank, to 8 for example"
        )
    check_unfrozen(config, len(aligner.language_model.model.layers))
    return f"language_model.model.layers[-{config.unfreeze_layers}:]"


def check_unfrozen(config: AlignmentConfig, depth: int) -> None:
    """Raise `UserError` where more layers are to be unfrozen than the `depth` that there are."""
    if config.unfreeze_layers > depth:
        raise UserError(f"--unfreeze-layers {config.unfreeze_layers}: the language model has {depth} layers")


def plan_alignment(config: AlignmentConfig, aligner: Qwen3Aligner, num_rows: int) -> MemoryPlan:
    """What a run needs whose training and validation splits have `num_rows` pictures."""
    trained = {*match_parameters(aligner, "projector"), *match_parameters(aligner, unfrozen_part(config, aligner))}
    num_cached_rows = num_rows if config.cached_features else 0
    size = {"batch_size": config.data.batch_size, "num_cached_rows": num_cached_rows}
    return plan_memory(aligner, trained, config.trainer, **size)


# 48 pictures an update. What a batch of 16 needs is in docs/on-a-mac.md; the names say for which machine.
FLICKR30K = AlignmentConfig(
    data=CaptionDataConfig(source="nlphuji/flickr30k@refs/convert/parquet", split_column="split", batch_size=16),
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
FLICKR30K_ROWS = 29_000 + 1_014  # of its training and validation splits (arXiv 1412.2306)
FLICKR30K_PRESETS = {
    "flickr30k": Preset(
        "CLIP ViT-B/32 and Qwen3-0.6B on Flickr30k; the last two layers are unfrozen; for 16 GB", FLICKR30K
    ),
    "flickr30k-lora": Preset("the same with LoRA adapters in all layers; for 16 GB", FLICKR30K_LORA),
    "flickr30k-qlora": Preset("adapters on a language model of 4 bits; for 8 GB", FLICKR30K_QLORA),
    "flickr30k-32gb": Preset("as flickr30k, in larger batches and nothing computed twice; for 32 GB", FLICKR30K_32GB),
}
