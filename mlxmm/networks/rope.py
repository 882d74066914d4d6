"""Rotary position embeddings (RoFormer, arXiv 2104.09864) as transformers computes them: `modeling_rope_utils.py`.

D features of a head, L positions. A test of the networks of mlx-lm, which compute their own.
"""

import math

import numpy as np


def inverse_frequencies(config: dict) -> tuple[np.ndarray, float]:
    """The radians (D / 2,) that a head's pairs of features turn from a position to the next, and what they are
    multiplied with, of a configuration that `language_model_config.complete` made."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    plain = config["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    rope = config["rope_scaling"] or {"rope_type": "default"}
    kinds = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}  # "dynamic" begins beyond the context
    return kinds.get(rope["rope_type"], lambda *_: (plain, 1.0))(plain, rope, config["rope_theta"])


def _linear(plain: np.ndarray, rope: dict, theta: float) -> tuple[np.ndarray, float]:
    return plain / rope["factor"], 1.0


def _llama3(plain: np.ndarray, rope: dict, theta: float) -> tuple[np.ndarray, float]:
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clip(0, 1)
    return plain * ((1 - smooth) / rope["factor"] + smooth), 1.0


def _yarn(plain: np.ndarray, rope: dict, theta: float) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071)."""
    half, length = len(plain), rope["original_max_position_embeddings"]
    place = lambda turns: half * math.log(length / (turns * 2 * math.pi)) / math.log(theta)
    low = max(math.floor(place(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(place(rope.get("beta_slow", 1))), 2 * half - 1)
    ramp = ((np.arange(half) - low) / max(high - low, 0.001)).clip(0, 1)
    size = lambda scale: 0.1 * scale * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    scale = size(rope["mscale"]) / size(rope["mscale_all_dim"]) if rope.get("mscale") else size(1)
    return plain * (ramp / rope["factor"] + 1 - ramp), scale
