"""SigLIP (arXiv 2303.15343): two towers without class token and causal mask, under transformers' parameter names.

B images or texts, H x W pixels, P patches, L tokens, D features of a tower, E of the shared space.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from mlxmm.networks import towers
from mlxmm.networks.towers import (
    TextConfig,
    TextEmbeddings,
    Tower,
    VisionConfig,
    VisionEmbeddings,
    VisionTower,
    config_from_hub,
    l2_normalize,
)
from mlxmm.networks.transformer import MLP, Attention, Encoder

INITIAL_SCALE, INITIAL_BIAS = 10.0, -10.0  # the paper's, section 3.2
# What transformers takes for settings that a config.json leaves out.
VISION_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VISION_DEFAULTS |= {"image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
TEXT_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
TEXT_DEFAULTS |= {"vocab_size": 32000, "max_position_embeddings": 64, "eos_token_id": 49407}
TEXT_DEFAULTS |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
PACKED = "head.attention.in_proj_"  # PyTorch's name for q, k and v in one


class PoolingHead(nn.Module):
    """One learned query that attends to all patches (arXiv 2106.04560)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = config.hidden_size**-0.5 * mx.random.normal((1, 1, config.hidden_size))
        self.attention = Attention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, P, D) to (B, D)."""
        B, _, D = x.shape
        pooled = self.attention(mx.broadcast_to(self.probe, (B, 1, D)), keys_from=x)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SiglipVisionTower(VisionTower):
    def __init__(self, config: VisionConfig, *, use_head: bool = True):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config, class_token=False, bias=True)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if use_head:
            self.head = PoolingHead(config)

    def __call__(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) to (B, D)."""
        return self.head(self.post_layernorm(self.hidden_states(images)))


class SiglipTextTower(Tower):
    def __init__(self, config: TextConfig, projection_dim: int):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, projection_dim)

    def __call__(self, tokens: mx.array) -> mx.array:
        """(B, L) tokens, padded to the tower's full length, to (B, E): the state at the last position."""
        return self.head(self.final_layer_norm(self.hidden_states(tokens)[:, -1]))


class Siglip(nn.Module):
    """Two towers into one space of unit vectors. The space is the vision tower's: `projection_dim` is its width."""

    def __init__(self, vision: VisionConfig, text: TextConfig, projection_dim: int):
        super().__init__()
        self.vision_model = SiglipVisionTower(vision)
        self.text_model = SiglipTextTower(text, projection_dim)
        self.logit_scale, self.logit_bias = mx.array([math.log(INITIAL_SCALE)]), mx.array([INITIAL_BIAS])

    def encode_image(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) to (B, E), unit length."""
        return l2_normalize(self.vision_model(images))

    def encode_text(self, tokens: mx.array) -> mx.array:
        """(B, L) to (B, E), unit length."""
        return l2_normalize(self.text_model(tokens))

    def __call__(self, images: mx.array, tokens: mx.array) -> mx.array:
        """Logits (B images, B texts), in float32; the sigmoid of each is the probability that the pair matches."""
        return self.logits(self.encode_image(images), self.encode_text(tokens))

    def logits(self, images: mx.array, texts: mx.array) -> mx.array:
        """Logits from features, (B, E) each."""
        scale, bias = (x.astype(mx.float32) for x in (self.logit_scale, self.logit_bias))
        return scale.exp() * (images @ texts.T) + bias


def vision_tower(values: dict) -> SiglipVisionTower:
    """The tower of a `config.json` of model_type siglip_vision_model, with fresh weights."""
    config = config_from_hub(VisionConfig, values, VISION_DEFAULTS)
    return SiglipVisionTower(config, use_head=values.get("vision_use_head") is not False)


def from_hub(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """A Hub checkpoint's arrays in our layout: as `towers.from_hub`, with q, k and v of the pooling head split."""
    arrays = {}
    for name, array in towers.from_hub(weights).items():
        if PACKED in name and len(array) % 3 == 0:
            head, kind = name.split("in_proj_")
            arrays |= {f"{head}{part}_proj.{kind}": third for part, third in zip("qkv", mx.split(array, 3))}
        else:
            arrays[name] = array
    return arrays


def to_hub(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The inverse of `from_hub`."""
    arrays = towers.to_hub(weights)
    for query in [name for name in arrays if "head.attention.q_proj." in name]:
        thirds = [arrays.pop(query.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        arrays[query.replace("q_proj.", "in_proj_")] = mx.concatenate(thirds)
    return arrays
