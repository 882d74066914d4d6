"""The pre-norm transformer block that the towers of CLIP, SigLIP and ViT are made of, under CLIP's parameter names.

B sequences, L positions, S positions attended to, D features.
"""

import attrs
import mlx.core as mx
import mlx.nn as nn
from attrs.validators import ge, gt, in_

from mlxmm.compute import functional as F
from mlxmm.config import checked, option

ACTIVATIONS = {"quick_gelu": F.quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": F.gelu_tanh}


@attrs.frozen(kw_only=True, field_transformer=checked)
class TransformerConfig:
    """Sizes of one tower, under the names of a CLIP `config.json`."""

    qkv_bias = True  # a setting of ViT's
    hidden_size: int = option(64, "features of a position", ge(1))
    num_hidden_layers: int = option(3, "blocks", ge(1))
    num_attention_heads: int = option(4, "attention heads", ge(1))
    intermediate_size: int = option(256, "features inside the MLP", ge(1))
    hidden_act: str = option("quick_gelu", "activation of the MLP", in_(tuple(ACTIVATIONS)))
    layer_norm_eps: float = option(1e-5, "added to the variance", gt(0))

    def __attrs_post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} does not divide into {self.num_attention_heads} heads")


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=config.qkv_bias) for _ in range(3))
        self.out_proj = nn.Linear(D, D)

    def __call__(self, x: mx.array, mask=None, *, keys_from: mx.array | None = None) -> mx.array:
        """(B, L, D) to (B, L, D). Positions attend to those of `keys_from` (B, S, D); without, to each other."""
        B, L, D = x.shape
        keys_from = x if keys_from is None else keys_from
        q, k, v = (
            project(states).reshape(B, -1, self.num_heads, D // self.num_heads).transpose(0, 2, 1, 3)
            for project, states in ((self.q_proj, x), (self.k_proj, keys_from), (self.v_proj, keys_from))
        )
        mixed = F.attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)  # (B, heads, L, D / heads)
        return self.out_proj(mixed.transpose(0, 2, 1, 3).reshape(B, L, D))


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = config.hidden_act
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask=None) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Blocks in a row, initialised for training from scratch."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        for layer in self.layers:
            # GPT-2's scaling, as in OpenAI's CLIP: the sum of 2 * layers branches keeps its variance.
            for last in (layer.self_attn.out_proj, layer.mlp.fc2):
                last.weight = last.weight * (2 * len(self.layers)) ** -0.5
            for linear in (*layer.self_attn.children().values(), *layer.mlp.children().values()):
                if "bias" in linear:
                    linear.bias = mx.zeros_like(linear.bias)

    def __call__(self, x: mx.array, mask=None, num_layers: int | None = None) -> mx.array:
        for layer in self.layers[:num_layers]:
            x = layer(x, mask)
        return x
