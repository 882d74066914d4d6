"""A Qwen3 of more features that computes the same: LLaVA has one width for projector and language model.

The added features are zero in every state: no layer writes them, so it does not matter what reads them. RMSNorm over W
features, D of which are not zero, divides by sqrt(D / W) of what it did: its weights are scaled by that, and epsilon by
its square. Queries and keys are normalised with the same epsilon, over as many features as before, so they are scaled
too. Outputs are the same to within rounding, and to the bit where scales are powers of 2: where W is 4 times D.
"""

import math
from collections.abc import Mapping

import mlx.core as mx

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
SCALED = (*NORMS, *(f"{name}_proj.{kind}" for name in ("q", "k") for kind in ("weight", "bias")))
WRITE = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")  # (D, …), into the states
READ = ("embed_tokens.weight", "lm_head.weight", *(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up")))


def widen(weights: Mapping[str, mx.array], width: int, wider: int) -> dict[str, mx.array]:
    """The arrays of a Qwen3 with `width` features, by mlx-lm's names, for one with `wider` features."""
    scaled = _scaled(weights, math.sqrt(width / wider))
    return {name: mx.pad(array, _padding(name, array.ndim, wider - width)) for name, array in scaled.items()}


def narrow(weights: Mapping[str, mx.array], shapes: Mapping[str, tuple], width: int, wider: int) -> dict[str, mx.array]:
    """What `widen` was given, of its `shapes`."""
    cut = {name: array[tuple(map(slice, shapes[name]))] for name, array in weights.items()}
    return _scaled(cut, math.sqrt(wider / width))


def widened_config(config: dict, wider: int) -> dict:
    """The `config.json` of a Qwen3 with `wider` features instead of its own."""
    epsilon = config["rms_norm_eps"] * config["hidden_size"] / wider
    return config | {"hidden_size": wider, "rms_norm_eps": epsilon}


def _scaled(weights: Mapping[str, mx.array], scale: float) -> dict[str, mx.array]:
    change = lambda array: (array.astype(mx.float32) * scale).astype(array.dtype)
    return {name: change(array) if name.endswith(SCALED) else array for name, array in weights.items()}


def _padding(name: str, ndim: int, missing: int) -> list[tuple[int, int]]:
    """Of each axis of an array."""
    before = [(0, 0)] * (ndim - 1)
    if name.endswith((*NORMS, *WRITE)):
        return [(0, missing), *before]
    return [*before, (0, missing if name.endswith(READ) else 0)]
