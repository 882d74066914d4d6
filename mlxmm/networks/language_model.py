"""Causal language models. This is the only file that imports mlx-lm.

B sequences, L positions, D features, V vocabulary.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs.validators import ge, gt
from mlx.utils import tree_flatten, tree_map

from mlxmm import environment
from mlxmm.compute.cores import in_halves
from mlxmm.compute.precision import HALF, dtype_name
from mlxmm.compute.quantized import is_quantized, unpacked, use_unpacking
from mlxmm.config import checked, option
from mlxmm.errors import UserError
from mlxmm.networks.fast_layers import use_fast_layers
from mlxmm.networks.language_model_config import arguments, complete, require_compared
from mlxmm.networks.narrow_rope import use_rope_of_narrow_heads
from mlxmm.networks.rope import inverse_frequencies
from mlxmm.storage.atomic import write_json
from mlxmm.storage.pretrained import read_config, require_weights, weight_files, write_arrays

ROPE_POSITIONS = 64  # at which a network's RoPE is checked
QUANTIZATION = ("quantization", "quantization_config")  # keys of a config.json


@attrs.frozen(kw_only=True, field_transformer=checked)
class Qwen3Config:
    """A small Qwen3, under the names of its `config.json`."""

    hidden_size: int = option(64, "features of a position", ge(1))
    num_hidden_layers: int = option(4, "blocks", ge(1))
    intermediate_size: int = option(192, "features inside the MLP", ge(1))
    num_attention_heads: int = option(4, "query heads", ge(1))
    num_key_value_heads: int = option(4, "key and value heads", ge(1))
    head_dim: int = option(16, "features of a head", ge(2))
    max_position_embeddings: int = option(512, "longest text, in tokens", ge(1))
    rope_theta: float = option(10_000.0, "base of the rotary position embeddings", gt(0))
    rms_norm_eps: float = option(1e-6, "added to the mean square", gt(0))

    def to_hub(self, tokenizer) -> dict:
        """The `config.json` that mlx-lm and transformers read."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "dtype": "float32",
            **attrs.asdict(self),
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "attention_bias": False,
        }


def build_language_model(config: dict) -> nn.Module:
    """mlx-lm's network for a `config.json`, with fresh weights. Raises `UserError` if mlx-lm does not support it."""
    with _config_errors("config.json describes"):
        network, settings = _network_and_settings(complete(config))
        model = network(settings)
    use_unpacking(model)
    use_fast_layers(model)
    use_rope_of_narrow_heads(model)
    for name, part in model.named_modules():
        if name.endswith((".o_proj", ".down_proj")):
            # GPT-2's scaling: the sum of 2 * layers branches keeps its variance.
            part.weight = part.weight * (2 * len(model.layers)) ** -0.5
    return model


def _network_and_settings(config: dict) -> tuple[type, Any]:
    """mlx-lm's class of the network of a `complete` configuration, and what it is made with."""
    from mlx_lm.utils import _get_classes

    network, settings = _get_classes(config)
    return network, settings.from_dict(arguments(config))


@contextlib.contextmanager
def _config_errors(what: str) -> Iterator[None]:
    """Turn whatever mlx-lm raises over a `config.json` or weights that it does not take into one `UserError` line."""
    try:
        yield
    except (Exception, SystemExit) as error:  # its dataclasses', its networks' and importers' own
        line = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        line = re.sub(r"ModelArgs.__init__\(\) missing \d+ required positional arguments?:", "config.json lacks", line)
        line = "it wants a package that is not there" if isinstance(error, SystemExit) else line
        raise UserError(f"{what} a language model that mlx-lm does not support: {line}") from None


def require_language_model(folder: Path) -> None:
    """Raise `UserError` unless `folder` has all files of a network that mlx-lm has. No weights are read."""
    with _config_errors(f"{folder} holds"):
        _network_and_settings(complete(read_config(folder)))
    if (file := weight_files(folder)[0]).suffix != ".safetensors":
        raise UserError(f"{folder} holds no language model for mlx-lm: it has {file.name}, and no model.safetensors")
    require_weights(folder)


def load_language_model(folder: Path, bits: int = 0) -> tuple[nn.Module, dict]:
    """Load mlx-lm's network and its configuration from a folder in the Hub's layout.

    Weights keep their dtype, except that half precision becomes float32 on a CPU, where its arithmetic is slow. `bits`
    quantizes full-precision weights. Raises `UserError` if mlx-lm does not support the network, or cannot give it
    embeddings.
    """
    from mlx_lm.utils import load_config, load_model, quantize_model

    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no language model: config.json is missing")
    read_config(folder)  # says what is damaged
    with _config_errors(f"{folder} holds"):
        own = complete(load_config(folder))
        network, settings = _network_and_settings(own)
        given = SimpleNamespace(from_dict=lambda config: settings)
        classes = lambda config: (network, given)
        model, config = load_model(folder, get_model_classes=classes, trust_remote_code=False)
    config = own | {name: config[name] for name in QUANTIZATION if name in config}
    if widens_half_precision():
        model.update(tree_map(_to_float32, model.parameters()))
    if bits and any(map(is_quantized, model.modules())):
        raise UserError(f"{folder} is quantized already: leave out --module.lm-bits {bits}")
    if bits:
        model, config = quantize_model(model, config, group_size=None, bits=bits)
        mx.eval(model.parameters())  # frees the full-precision weights, which the lazy quantized ones refer to
    use_unpacking(model)
    use_fast_layers(model)
    use_rope_of_narrow_heads(model)
    _check_embeddings(model, folder)
    require_compared(model.model_type, folder)
    _check_rope(model, config, folder)
    return model, config


def unloaded_language_model(folder: Path, bits: int = 0) -> tuple[nn.Module, dict]:
    """Like `load_language_model`, from `config.json` alone: types and shapes are those of the real network. Its fresh
    weights are not computed as long as nobody evaluates them, and until then take no memory."""
    from mlx_lm.utils import quantize_model

    with _config_errors(f"{folder} holds"):
        config = complete(read_config(folder))
    model = build_language_model(config)
    set_dtype(model, {"dtype": config.get("torch_dtype", "float32")} | config)
    if bits:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how many bits a weight has
            model, config = quantize_model(model, config, group_size=None, bits=bits)
    return model, config


def widens_half_precision() -> bool:
    """Whether half-precision weights become float32 when they are loaded: on a CPU."""
    return mx.default_device() == mx.cpu and not environment.acts_as_gpu()


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype in which the network computes: that of its embeddings."""
    return embed(model, mx.array([0])).dtype  # not computed, only described


def with_dtype(config: dict, model: nn.Module) -> dict:
    """`config` with the dtype in which `model` computes, for `set_dtype`."""
    return without_dtype(config) | {"dtype": dtype_name(compute_dtype(model))}


def set_dtype(model: nn.Module, config: dict) -> None:
    """Give fresh weights the dtype that `config` names, as `load_language_model` would."""
    model.set_dtype(mx.float32 if widens_half_precision() else getattr(mx, config.get("dtype", "float32")))


def without_dtype(config: dict) -> dict:
    """A `config.json` without the dtype of its weights, which transformers 4 called "torch_dtype"."""
    return {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}


def quantize_as(module: nn.Module, weights: dict[str, mx.array]) -> None:
    """Quantize the layers of `module` whose arrays in `weights` (by dotted name) are quantized."""
    from mlx_lm.utils import infer_quant_config

    def choose(path: str, part: nn.Module) -> dict | bool:
        return f"{path}.scales" in weights and infer_quant_config(path, part, weights)

    nn.quantize(module, class_predicate=choose)
    use_unpacking(module)


def save_language_model(folder: Path, model: nn.Module, config: dict) -> None:
    """Write `config.json` and `model.safetensors` for mlx-lm and transformers, in one dtype; adapters are merged."""
    dtype = getattr(mx, config.get("dtype", "float32"))
    weights = {name: array.astype(dtype) for name, array in dense_weights(model).items()}
    write_json(folder / "config.json", dense_config(config))
    write_arrays(folder / "model.safetensors", weights, format="mlx")


def dense_weights(model: nn.Module) -> dict[str, mx.array]:
    """The arrays of `model` with adapters merged and quantized layers dequantized; `model` does not change."""
    weights = dict(tree_flatten(model.parameters()))
    for name, part in sorted(model.named_modules()):  # sorted: a LoRA layer comes before the layer inside it
        if hasattr(part, "fuse") or f"{name}.scales" in weights:
            weights = {key: array for key, array in weights.items() if not key.startswith(f"{name}.")}
            weights |= {f"{name}.{key}": array for key, array in _dense(part).items()}
    return weights


def dense_config(config: dict) -> dict:
    """The `config.json` of a network with `dense_weights`."""
    return {name: value for name, value in config.items() if name not in QUANTIZATION}


def _dense(part: nn.Module) -> dict[str, mx.array]:
    """The arrays of the plain layer that computes the same as mlx-lm's LoRA layer or a quantized one."""
    if hasattr(part, "fuse"):
        return dict(part.fuse(dequantize=True).parameters())
    form = {"group_size": part.group_size, "bits": part.bits, "mode": part.mode}
    weight = mx.dequantize(part.weight, part.scales, part.get("biases"), **form)
    return {"weight": weight} | ({"bias": part.bias} if "bias" in part else {})


def embed(model: nn.Module, tokens: mx.array) -> mx.array:
    """(B, L) tokens to (B, L, D)."""
    return model.model.embed_tokens(tokens)


def num_rows(model: nn.Module) -> int:
    """The tokens that have a row in the table of embeddings."""
    return len(model.model.embed_tokens.weight)


def hidden_states(model: nn.Module, embeddings: mx.array, cache=None) -> mx.array:
    """(B, L, D) embeddings to the normalised states (B, L, D) that the head reads, with causal attention."""
    run = lambda rows: model.model(None, cache, input_embeddings=rows.astype(compute_dtype(model)))
    return in_halves(run, embeddings) if cache is None else run(embeddings)


def head(model: nn.Module, states: mx.array) -> mx.array:
    """(B, L, D) to logits (B, L, V)."""
    part = head_part(model)
    return part.as_linear(states) if part is not getattr(model, "lm_head", None) else part(states)


def lora_layers(model: nn.Module, num_layers: int, settings: dict, dora: bool) -> None:
    """Add mlx-lm's adapters to the last `num_layers` layers; 0: to all."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    linear_to_lora_layers(model, num_layers, settings, use_dora=dora)


def make_cache(model: nn.Module, num_positions: int) -> list:
    """An empty cache of keys and values, one entry a layer, that takes room for `num_positions` at a time (mlx-lm: 256,
    of which a caption needs a third)."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for entry in cache:
        if hasattr(entry, "step"):
            entry.step = num_positions
    return cache


@attrs.frozen
class CachedLanguageModel:
    """mlx-lm's network as a `DecoderInterface`, for `generate`."""

    model: nn.Module

    def make_cache(self, num_positions: int = 1) -> list:
        return make_cache(self.model, num_positions)

    def embed(self, tokens: mx.array) -> mx.array:
        return embed(self.model, tokens)

    def logits(self, embeddings: mx.array, cache: list) -> mx.array:
        """(B, L, D) to the logits (B, V) after the last position; the head reads no other position."""
        return head(self.model, hidden_states(self.model, embeddings, cache)[:, -1:])[:, 0]


def keep_likeliest(logits: mx.array, top_k: int, top_p: float) -> mx.array:
    """Log-probabilities of (B, V) float32 logits, with -inf for tokens that top-k or top-p sampling excludes.

    `top_k` keeps the largest (0: all); of these `top_p` keeps the fewest whose probabilities sum to it. The filters
    are mlx-lm's, in transformers' order.
    """
    from mlx_lm.sample_utils import apply_top_k, apply_top_p

    if 0 < top_k < logits.shape[-1]:
        logits = apply_top_k(logits, top_k)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return apply_top_p(logits, top_p) if top_p < 1 else logits


def head_weight(model: nn.Module) -> mx.array | None:
    """The head's matrix (V, D), dequantized if need be; None if the head has a bias or an adapter."""
    part = head_part(model)
    if "bias" in part or not isinstance(part, nn.Linear | nn.Embedding | nn.QuantizedLinear | nn.QuantizedEmbedding):
        return None
    return unpacked(part) if is_quantized(part) else part.weight


def head_part(model: nn.Module) -> nn.Module:
    """The layer that computes logits: lm_head, or the token embeddings if they are tied."""
    return model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens


def _check_embeddings(model: nn.Module, folder: Path) -> None:
    """Raise `UserError` unless `embed`, `hidden_states` and `head` together compute what the network computes."""
    with contextlib.suppress(Exception):  # a network that reads other things fails in a way of its own
        if _takes_embeddings(model):
            return
    raise UserError(
        f"{folder} holds a {model.model_type}, to which mlx-lm cannot give embeddings: take a Qwen3 or Llama"
    )


def _takes_embeddings(model: nn.Module) -> bool:
    from mlx_lm.utils import does_model_support_input_embeddings

    inner = getattr(model, "model", None)
    if not (isinstance(inner, nn.Module) and "embed_tokens" in inner and does_model_support_input_embeddings(inner)):
        return False
    # Some networks scale their embeddings or logits elsewhere (Gemma): only a trial shows it.
    tokens = mx.array([[0, 1]])
    ours, own = head(model, hidden_states(model, embed(model, tokens))), model(tokens)
    return bool(mx.abs(ours - own).max() <= 1e-2 * mx.abs(own).max())


def _check_rope(model: nn.Module, config: dict, folder: Path) -> None:
    """Raise `UserError` unless the network turns queries and keys as transformers does with this `config.json`."""
    frequencies, scale = inverse_frequencies(config)
    angles = np.arange(ROPE_POSITIONS)[:, None] * frequencies  # (L, D / 2)
    turned = scale * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    start = np.concatenate([np.ones_like(angles), np.zeros_like(angles)], axis=1)
    turns = config.get("no_rope_layers") or [True] * len(model.layers)  # of SmolLM3; what it calls so have RoPE
    for layer, is_turned in zip(model.layers, turns, strict=True):
        ours = np.array(layer.self_attn.rope(mx.array(start[None, None], dtype=mx.float32)))[0, 0]
        if np.abs(ours - (turned if is_turned else start)).max() > 1e-3:
            raise UserError(f"{folder} holds a {model.model_type} whose RoPE mlx-lm does not compute as transformers")


def _to_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if array.dtype in HALF else array
