"""CLIP (arXiv 2103.00020): a vision and a text tower, under transformers' parameter names.

B images or texts, H x W pixels, P patches, L tokens, D features of a tower, E of the shared space.
"""

import math
from itertools import chain

import mlx.core as mx
import mlx.nn as nn

from mlxmm.networks.towers import (
    TextConfig,
    TextEmbeddings,
    Tower,
    VisionConfig,
    VisionEmbeddings,
    VisionTower,
    config_from_hub,
    from_hub,
    l2_normalize,
    to_hub,
)
from mlxmm.networks.transformer import Encoder

__all__ = ["CLIP", "CLIPTextTower", "CLIPVisionTower", "from_hub", "initialize", "to_hub", "vision_tower"]

INITIAL_TEMPERATURE = 0.07  # the paper's, section 2.5
# What transformers takes for settings that a config.json leaves out.
VISION_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VISION_DEFAULTS |= {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
TEXT_DEFAULTS = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
TEXT_DEFAULTS |= {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
TEXT_DEFAULTS |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


class CLIPVisionTower(VisionTower):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config, class_token=True, bias=False)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # [sic] in checkpoints
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed(self, inputs: mx.array) -> mx.array:
        return self.pre_layrnorm(self.embeddings(inputs))

    def __call__(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) to the class token's (B, D)."""
        return self.post_layernorm(self.hidden_states(images)[:, 0])


class CLIPTextTower(Tower):
    mask = "causal"

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, tokens: mx.array) -> mx.array:
        """(B, L) tokens to (B, D): the state at the end token, which attends to the whole text."""
        eos = self.config.eos_token_id
        # Configurations of OpenAI's first upload say 2, and mean the highest id (transformers #24773).
        ends = tokens if eos == 2 else (tokens == eos)
        last = self.hidden_states(tokens)[mx.arange(len(tokens), dtype=mx.uint32), ends.argmax(axis=1)]
        return self.final_layer_norm(last)


class CLIP(nn.Module):
    """Two towers and the projections into one space of unit vectors."""

    def __init__(self, vision: VisionConfig, text: TextConfig, projection_dim: int):
        super().__init__()
        self.vision_model, self.text_model = CLIPVisionTower(vision), CLIPTextTower(text)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        self.logit_scale = mx.array(math.log(1 / INITIAL_TEMPERATURE))

    def encode_image(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) to (B, E), unit length."""
        return l2_normalize(self.visual_projection(self.vision_model(images)))

    def encode_text(self, tokens: mx.array) -> mx.array:
        """(B, L) to (B, E), unit length."""
        return l2_normalize(self.text_projection(self.text_model(tokens)))

    def __call__(self, images: mx.array, tokens: mx.array) -> mx.array:
        """Logits (B images, B texts): cosines over the learned temperature, in float32."""
        return self.logits(self.encode_image(images), self.encode_text(tokens))

    def logits(self, images: mx.array, texts: mx.array) -> mx.array:
        """Logits from features, (B, E) each."""
        return mx.exp(self.logit_scale.astype(mx.float32)) * images @ texts.T


def vision_tower(values: dict) -> CLIPVisionTower:
    """The tower of a `config.json` of model_type clip_vision_model, with fresh weights."""
    return CLIPVisionTower(config_from_hub(VisionConfig, values, VISION_DEFAULTS))


def initialize(network: CLIP) -> None:
    """Initialise all weights as OpenAI's code does (openai/CLIP, clip/model.py).

    It gives standard deviations for the text tower, and for class token, positions and projection of the vision
    tower; that tower's blocks stay as PyTorch makes them. Biases are zero.
    """
    vision, text = network.vision_model, network.text_model
    Dv, Dt, depth = vision.config.hidden_size, text.config.hidden_size, text.config.num_hidden_layers
    stds = [
        (text.embeddings.token_embedding, 0.02),
        (text.embeddings.position_embedding, 0.01),
        (network.text_projection, Dt**-0.5),
        (vision.embeddings.position_embedding, Dv**-0.5),
        (network.visual_projection, Dv**-0.5),
    ]
    branch = Dt**-0.5 * (2 * depth) ** -0.5
    stds += chain(*(_block_stds(b, Dt**-0.5, branch, (2 * Dt) ** -0.5, branch) for b in text.encoder.layers))
    # PyTorch's: Xavier over the packed q, k, v of (3 D, D); elsewhere uniform within fan_in ** -0.5.
    torch = (2 * Dv) ** -0.5, (3 * Dv) ** -0.5, (3 * Dv) ** -0.5, (3 * vision.config.intermediate_size) ** -0.5
    stds += chain(*(_block_stds(b, *torch) for b in vision.encoder.layers))
    for part, std in stds:
        part.weight = std * mx.random.normal(part.weight.shape)
    vision.embeddings.class_embedding = Dv**-0.5 * mx.random.normal((Dv,))


def _block_stds(block, attn: float, attn_out: float, fc: float, fc_out: float) -> list:
    attention, mlp = block.self_attn, block.mlp
    packed = [(part, attn) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return [*packed, (attention.out_proj, attn_out), (mlp.fc1, fc), (mlp.fc2, fc_out)]
