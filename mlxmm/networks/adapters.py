"""Adapters: small trained matrices beside the frozen ones of a language model. The layers are mlx-lm's."""

import attrs
import mlx.core as mx
import mlx.nn as nn
from attrs.validators import ge, gt, lt

from mlxmm.config import option
from mlxmm.errors import UserError
from mlxmm.networks.language_model import lora_layers


@attrs.frozen(kw_only=True)
class LoRAConfig:
    """LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), with mlx-lm's meaning of the numbers."""

    rank: int = option(0, "inner size of the language model's adapters; 0: no adapters", ge(0))
    scale: float = option(20.0, "what the adapters' output is multiplied by (elsewhere alpha / rank)", gt(0), rare=True)
    dropout: float = option(0.0, "fraction of the adapters' inputs dropped in training", ge(0), lt(1), rare=True)
    num_layers: int = option(0, "how many of the last layers get adapters; 0: all", ge(0), rare=True)
    keys: tuple[str, ...] = option(
        (), "what gets one in a layer, for example self_attn.q_proj; none: all that can", rare=True
    )
    dora: bool = option(False, "DoRA: learn the lengths of the adapted rows separately", rare=True)


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Put adapters into mlx-lm's `model`, whose outputs stay what they are until the adapters are trained.

    Raises `UserError` for keys that name nothing, or nothing that mlx-lm has such an adapter for.
    """
    if config.rank == 0:
        return
    _check_keys(model, config)
    settings = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}
    if config.keys:
        settings["keys"] = set(config.keys)
    try:
        lora_layers(model, config.num_layers, settings, config.dora)
    except ValueError as error:
        raise UserError(f"lora: {error}") from None


def _check_keys(model: nn.Module, config: LoRAConfig) -> None:
    """mlx-lm passes over keys that name nothing."""
    within = {name: part for layer in model.layers for name, part in layer.named_modules()}
    parts = within | dict(model.named_modules())
    if unknown := sorted(set(config.keys) - set(parts)):
        known = sorted(name for name, part in within.items() if "weight" in part and part.weight.ndim > 1)
        raise UserError(f"lora.keys: no layer has {', '.join(unknown)}; choose from {', '.join(known)}")
    if config.dora and any(isinstance(parts[key], nn.QuantizedEmbedding) for key in config.keys):
        raise UserError("lora.keys: mlx-lm has no DoRA for quantized embeddings; leave them out, or use LoRA")


def adapter_names(model: nn.Module) -> list[str]:
    """The dotted names of the adapters' own parameters."""
    adapters = [(prefix, part) for prefix, part in model.named_modules() if "lora_a" in part]
    return [f"{prefix}.{key}" for prefix, part in adapters for key in part if isinstance(part[key], mx.array)]
