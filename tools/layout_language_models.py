"""The files of language models on the Hub, as their repositories have them: Qwen3-0.6B-Base and SmolLM2-135M.

`tiny` narrows the networks; the rows of their vocabularies stay, since token ids do.
"""

from tools.layout_weights import Array


def qwen3_config(tiny: bool) -> dict:
    """Qwen3-0.6B-Base, whose table of embeddings has more rows than its tokenizer has tokens."""
    sizes = {"head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    if tiny:
        sizes = {"head_dim": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_643,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151_936,
        **sizes,
    }


def smollm2_config(tiny: bool) -> dict:
    """SmolLM2-135M, a Llama."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    if tiny:
        sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
        sizes |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100_000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "vocab_size": 49_152,
        **sizes,
    }


def arrays(config: dict) -> dict[str, Array]:
    """A decoder with tied embeddings: its file has no lm_head. Qwen3 also normalises queries and keys."""
    width = config["hidden_size"]
    head_dim = config.get("head_dim", width // config["num_attention_heads"])
    found = {"model.embed_tokens.weight": _matrix(config, config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = _layer(config, width, head_dim)
        if config["model_type"] == "qwen3":
            layer |= {f"self_attn.{name}_norm.weight": _gains(head_dim) for name in "qk"}
        found |= {f"model.layers.{i}.{name}": array for name, array in layer.items()}
    return found | {"model.norm.weight": _gains(width)}


def _layer(config: dict, width: int, head_dim: int) -> dict[str, Array]:
    inner = config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    matrices = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    layer = {f"{name}.weight": _matrix(config, *shape) for name, shape in matrices.items()}
    return layer | {f"{name}.weight": _gains(width) for name in ("input_layernorm", "post_attention_layernorm")}


def _matrix(config: dict, rows: int, columns: int) -> Array:
    return Array((rows, columns), config["initializer_range"], dtype="BF16")


def _gains(width: int) -> Array:
    return Array((width,), mean=1.0, dtype="BF16")
