"""ViT (arXiv 2010.11929) as a vision tower, under the parameter names of CLIP's.

B images, H x W pixels, D features.
"""

import attrs
import mlx.core as mx
import mlx.nn as nn

from mlxmm.config import checked, option
from mlxmm.networks import towers
from mlxmm.networks.towers import VisionConfig, VisionEmbeddings, VisionTower, config_from_hub
from mlxmm.networks.transformer import Encoder

# What transformers takes for settings that a config.json leaves out.
VISION_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VISION_DEFAULTS |= {"image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
# Parts of names, the Hub's and ours; where one contains another, the longer one first.
NAMES = [
    ("encoder.layer.", "encoder.layers."),
    ("attention.attention.query", "self_attn.q_proj"),
    ("attention.attention.key", "self_attn.k_proj"),
    ("attention.attention.value", "self_attn.v_proj"),
    ("attention.output.dense", "self_attn.out_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("layernorm_before", "layer_norm1"),
    ("layernorm_after", "layer_norm2"),
    ("cls_token", "class_embedding"),
    ("position_embeddings", "position_embedding.weight"),
    ("patch_embeddings.projection", "patch_embedding"),
]
# These have three axes on the Hub; the last one that is joined to the first.
THREE_AXES = {"class_embedding": -1, "position_embedding.weight": -2}
HEADS = ("classifier.", "pooler.", "decoder.", "embeddings.mask_token")  # layers that are not part of the tower


@attrs.frozen(kw_only=True, field_transformer=checked)
class ViTConfig(VisionConfig):
    """A ViT."""

    qkv_bias: bool = option(True, "add a bias to queries, keys and values")


class ViT(VisionTower):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config, class_token=True, bias=True)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) to the class token's (B, D), which a classifier reads."""
        return self.layernorm(self.hidden_states(images)[:, 0])


def vision_tower(values: dict) -> ViT:
    """The tower of a `config.json` of model_type vit, with fresh weights."""
    return ViT(config_from_hub(ViTConfig, values, VISION_DEFAULTS))


def from_hub(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of a ViTModel or ViTForImageClassification in our layout, without pooler and classifier."""
    arrays = {}
    for name, array in weights.items():
        name = name.removeprefix("vit.")
        if name.startswith(HEADS):
            continue
        for hub, ours in NAMES:
            name = name.replace(hub, ours)
        last = THREE_AXES.get(name.removeprefix("embeddings."))
        arrays[name] = array if last is None else array.flatten(0, last)
    return towers.from_hub(arrays)


def to_hub(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The inverse of `from_hub`: the arrays of a ViTModel without pooler."""
    arrays = {}
    for name, array in towers.to_hub(weights).items():
        if name.removeprefix("embeddings.") in THREE_AXES:
            array = array.reshape(1, -1, array.shape[-1])
        for hub, ours in reversed(NAMES):
            name = name.replace(ours, hub)
        arrays[name] = array
    return arrays
