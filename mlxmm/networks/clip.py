"""CLIP (arXiv 2103.00020): a vision and a text tower, under transformers' parameter names.

B images or texts, H x W pixels, P patches, L tokens, D features of a tower, E of the shared space.
"""

import math

import attrs
import mlx.core as mx
import mlx.nn as nn
from attrs.validators import ge

from mlxmm.config import option
from mlxmm.networks.transformer import Encoder, TransformerConfig

EMBEDDING_STD = 0.1  # of class, position and token embeddings, trained from scratch
INITIAL_TEMPERATURE = 0.07  # the paper's, section 2.5


@attrs.frozen(kw_only=True)
class VisionConfig(TransformerConfig):
    """A CLIP vision tower."""

    image_size: int = option(32, "side of the square image, in pixels", ge(1))
    patch_size: int = option(8, "side of one patch, in pixels", ge(1))


@attrs.frozen(kw_only=True)
class TextConfig(TransformerConfig):
    """A CLIP text tower."""

    hidden_size: int = option(32, "features of a position", ge(1))
    num_hidden_layers: int = option(1, "blocks", ge(1))
    intermediate_size: int = option(128, "features inside the MLP", ge(1))
    vocab_size: int = option(512, "tokens", ge(1))
    max_position_embeddings: int = option(24, "longest text, in tokens", ge(2))
    eos_token_id: int = option(0, "token whose position speaks for the text; 2: the highest id does", ge(0))


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        num_patches = (config.image_size // p) ** 2
        self.class_embedding = EMBEDDING_STD * mx.random.normal((D,))
        self.patch_embedding = PatchEmbedding(p, D)
        self.position_embedding = nn.Embedding(1 + num_patches, D)
        self.position_embedding.weight = EMBEDDING_STD * mx.random.normal((1 + num_patches, D))

    def __call__(self, images: mx.array) -> mx.array:
        patches = self.patch_embedding(images)  # (B, P, D)
        B, _, D = patches.shape
        first = mx.broadcast_to(self.class_embedding, (B, 1, D))
        x = mx.concatenate([first, patches], axis=1) + self.position_embedding.weight
        return self.patch_dropout(x) if "patch_dropout" in self else x


class PatchEmbedding(nn.Module):
    """A convolution of kernel and stride `patch_size`, as one matrix product: half the time of MLX's on a CPU."""

    def __init__(self, patch_size: int, hidden_size: int):
        super().__init__()
        scale = 1 / math.sqrt(3 * patch_size * patch_size)
        shape = (hidden_size, patch_size, patch_size, 3)  # MLX's order of a convolution's weights
        self.weight = mx.random.uniform(-scale, scale, shape)

    def __call__(self, images: mx.array) -> mx.array:
        D, p = self.weight.shape[:2]
        B, H, W, C = images.shape
        if H % p or W % p:
            raise ValueError(f"images are {H}x{W} pixels, not a multiple of patch_size={p}")
        patches = images.reshape(B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(B, -1, p * p * C) @ self.weight.reshape(D, -1).T  # (B, P, D)


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # [sic] in checkpoints
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, images: mx.array, layer: int = -1) -> mx.array:
        """(B, H, W, 3) to (B, 1 + P, D): what decoders read, the class token first, not normalised.

        `layer` counts as transformers' `hidden_states` does: 0 is what enters the first block, -1 what leaves
        the last. Blocks behind it are not run.
        """
        depth = len(self.encoder.layers)
        if not -depth - 1 <= layer <= depth:
            raise ValueError(f"layer {layer} of a tower with hidden states 0 to {depth}")
        x = self.pre_layrnorm(self.embeddings(images))
        return self.encoder(x, num_layers=layer % (depth + 1))

    def __call__(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) to the class token's (B, D)."""
        return self.post_layernorm(self.hidden_states(images)[:, 0])


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            table.weight = EMBEDDING_STD * mx.random.normal(table.weight.shape)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class TextTower(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, tokens: mx.array) -> mx.array:
        """(B, L) tokens to (B, D): the state at the end token, which has seen the whole text."""
        x = self.encoder(self.embeddings(tokens), mask="causal")
        # Configurations of OpenAI's first upload say 2, and mean the highest id (transformers #24773).
        ends = tokens if self.eos_token_id == 2 else (tokens == self.eos_token_id)
        last = x[mx.arange(len(tokens)), ends.argmax(axis=1)]
        return self.final_layer_norm(last)


class CLIP(nn.Module):
    """Two towers and the projections into one space of unit vectors."""

    def __init__(self, vision: VisionConfig, text: TextConfig, projection_dim: int):
        super().__init__()
        self.vision_model, self.text_model = VisionTower(vision), TextTower(text)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        self.logit_scale = mx.array(math.log(1 / INITIAL_TEMPERATURE))

    def encode_image(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) to (B, E), unit length."""
        return unit(self.visual_projection(self.vision_model(images)))

    def encode_text(self, tokens: mx.array) -> mx.array:
        """(B, L) to (B, E), unit length."""
        return unit(self.text_projection(self.text_model(tokens)))

    def __call__(self, images: mx.array, tokens: mx.array) -> mx.array:
        """Logits (B images, B texts): cosines over the learned temperature."""
        return self.logits(self.encode_image(images), self.encode_text(tokens))

    def logits(self, images: mx.array, texts: mx.array) -> mx.array:
        """The same of features, (B, E) each."""
        return mx.exp(self.logit_scale) * images @ texts.T


def unit(x: mx.array) -> mx.array:
    """Rows of length one."""
    return x * mx.rsqrt(mx.square(x).sum(-1, keepdims=True))


def from_hub(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """A Hub checkpoint's arrays in our layout: patches as (D, p, p, C), no position ids."""
    kept = {name: array for name, array in weights.items() if not name.endswith("position_ids")}
    return {name: a.transpose(0, 2, 3, 1) if _is_patch(name) else a for name, a in kept.items()}


def to_hub(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The inverse of `from_hub`."""
    return {name: a.transpose(0, 3, 1, 2) if _is_patch(name) else a for name, a in weights.items()}


def _is_patch(name: str) -> bool:
    return name.endswith("patch_embedding.weight")
