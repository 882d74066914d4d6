"""What the `config.json` of a language model says, read as transformers reads it and told to mlx-lm.

mlx-lm takes settings that it does not find for its own defaults, in silence. transformers 5 nests those of RoPE in
"rope_parameters", where most networks of mlx-lm do not look, and leaves out what its own defaults are.
"""

import sys
from pathlib import Path

from mlxmm.errors import UserError

# Families whose forward pass was compared with that of transformers (tests/networks/test_language_models.py), and
# what transformers takes for settings that a file leaves out.
_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "rope_theta": 10_000.0, "num_key_value_heads": 32}
DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10_000.0}
    | {"tie_word_embeddings": False},
    "smollm3": _QWEN | {"rope_theta": 2_000_000.0, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131_072, "rope_theta": 10_000.0}
    | {"num_key_value_heads": 8, "tie_word_embeddings": False, "sliding_window": 4096},
    "qwen2": _QWEN | {"tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096},
    "qwen3": _QWEN
    | {"tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096}
    | {"head_dim": 128},
}
# Kinds of RoPE that mlx-lm computes as transformers does, with the settings that both read.
ROPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),  # within max_position_embeddings that of "default"
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
NAMES = ("rope_type", "type", "rope_theta", "partial_rotary_factor")  # of every kind


def complete(config: dict) -> dict:
    """A `config.json` that mlx-lm, transformers 4 and transformers 5 all read as transformers 5 reads `config`.

    Raises `UserError` for a setting that mlx-lm does not compute as transformers does. Of a family that was not
    compared only RoPE is completed.
    """
    kind = config.get("model_type")
    if kind not in DEFAULTS:
        return config | _rope(config)
    if (activation := config.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise UserError(f"hidden_act is {activation!r}, and mlx-lm computes silu")
    config = DEFAULTS[kind] | _without_nulls(config)
    return config | _rope(config) | (_layers_with_rope(config) if kind == "smollm3" else {})


def require_compared(kind: str, folder: Path) -> None:
    """Raise `UserError` unless the networks of this family were compared with those of transformers."""
    if kind not in DEFAULTS:
        raise UserError(f"{folder} holds a {kind}, which was not compared with transformers: take a Qwen3 or Llama")


def arguments(config: dict) -> dict:
    """What mlx-lm's network is made with, of a `complete` configuration.

    No layer has a sliding window: within `context_length` it hides nothing.
    """
    if config.get("model_type") not in DEFAULTS:
        return config
    left_out = ("layer_types", "rope_traditional")
    return {name: value for name, value in config.items() if value is not None and name not in left_out}


def context_length(config: dict) -> int:
    """The most tokens that are computed as transformers does, of a `complete` configuration."""
    longest = config.get("max_position_embeddings") or sys.maxsize
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return min(longest, window) if window and config.get("model_type") != "llama" else longest


def _without_nulls(config: dict) -> dict:
    """The settings that say something: null is no value, but for a window, which it turns off."""
    kept = {name: value for name, value in config.items() if value is not None or name == "sliding_window"}
    if config.get("num_key_value_heads", 0 if config["model_type"] != "llama" else None) is None:
        kept["num_key_value_heads"] = config.get("num_attention_heads")
    return kept


def _rope(config: dict) -> dict:
    """RoPE under the names of both layouts, with transformers' precedence (`RotaryEmbeddingConfigMixin`)."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    is_compared = config.get("model_type") in DEFAULTS
    if rope and not isinstance(rope, dict):
        raise UserError(f"rope_parameters must be an object, {rope!r:.40} came")
    rope = {name: value for name, value in (rope or {}).items() if value is not None}
    theta, kind = rope.get("rope_theta") or config.get("rope_theta"), rope.get("rope_type") or rope.get("type")
    if not is_compared:  # its settings may be nested by kinds of layers, or be its own
        return {"rope_theta": theta} if theta else {}
    kind = kind or "default"
    _check_rope(kind, rope, config)
    own = {"rope_type": kind} | {name: rope[name] for name in ROPES[kind] if name in rope}
    if "original_max_position_embeddings" in ROPES[kind]:
        own.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    scaling = None if kind == "default" else own
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": own | {"rope_theta": theta}}


def _layers_with_rope(config: dict) -> dict:
    every = config.get("no_rope_layer_interval", 4)  # this layer and its multiples have none
    own = [int((layer + 1) % every != 0) for layer in range(config["num_hidden_layers"])]
    return {"no_rope_layers": config.get("no_rope_layers") or own}


def _check_rope(kind: str, rope: dict, config: dict) -> None:
    if kind not in ROPES:
        raise UserError(f"rope_type is {kind!r}, which mlx-lm does not compute as transformers does")
    if bad := [name for name in rope if name not in (*NAMES, *ROPES[kind])]:
        raise UserError(f"rope_parameters has {', '.join(bad)}, which mlx-lm does not compute as transformers does")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1:
        raise UserError("partial_rotary_factor is not 1: mlx-lm turns whole heads")
    if ("mscale" in rope) != ("mscale_all_dim" in rope):
        raise UserError("rope_parameters has one of mscale and mscale_all_dim, and both or none are needed")
    if kind != "default" and "factor" not in rope:
        raise UserError(f"rope_parameters lacks the factor of {kind!r}")
