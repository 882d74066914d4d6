"""Adapters: small trained matrices beside the frozen ones of a language model. The layers are mlx-lm's."""

import attrs
import mlx.core as mx
import mlx.nn as nn
from attrs.validators import ge, gt, lt

from mlxmm.config import checked, option
from mlxmm.errors import UserError
from mlxmm.networks.language_model import lora_layers


@attrs.frozen(kw_only=True, field_transformer=checked)
class LoRAConfig:
    """LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353), with mlx-lm's settings."""

    rank: int = option(0, "inner size of the language model's adapters; 0: no adapters", ge(0))
    scale: float = option(20.0, "factor of the adapters' output (alpha / rank in other libraries)", gt(0), rare=True)
    dropout: float = option(0.0, "fraction of the adapters' inputs dropped in training", ge(0), lt(1), rare=True)
    num_layers: int = option(0, "number of last layers that get adapters; 0: all", ge(0), rare=True)
    keys: tuple[str, ...] = option(
        (), "parts of a layer that get adapters, for example self_attn.q_proj; none: all that can", rare=True
    )
    dora: bool = option(False, "use DoRA, which learns the magnitude of each adapted row separately", rare=True)


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Add adapters to mlx-lm's `model`. Its outputs do not change until the adapters are trained.

    Raises `UserError` for keys that match no layer, or a layer that mlx-lm cannot adapt.
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
    """Raise `UserError` for keys without a match, which mlx-lm ignores silently."""
    within = {name: part for layer in model.layers for name, part in layer.named_modules()}
    parts = within | dict(model.named_modules())
    if unknown := sorted(set(config.keys) - set(parts)):
        known = sorted(name for name, part in within.items() if "weight" in part and part.weight.ndim > 1)
        raise UserError(f"lora.keys: no layer has {', '.join(unknown)}; choose from {', '.join(known)}")
    if config.dora and any(isinstance(parts[key], nn.QuantizedEmbedding) for key in config.keys):
        raise UserError("lora.keys: mlx-lm has no DoRA for quantized embeddings; leave them out, or use LoRA")


def adapter_names(model: nn.Module) -> list[str]:
    """The dotted names of the adapters' parameters, without those of the layers they adapt."""
    adapters = [(prefix, part) for prefix, part in model.named_modules() if "lora_a" in part]
    return [f"{prefix}.{key}" for prefix, part in adapters for key in part if isinstance(part[key], mx.array)]
