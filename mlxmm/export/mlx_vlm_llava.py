"""A LLaVA whose language model is a Qwen3, for mlx-vlm: vision tower -> projector -> language model.

mlx-vlm's own `llava` has Llama and Qwen2 as language models only. This file is copied into an exported folder, whose
config.json names it as its "model_file": mlx-vlm imports it from there. It needs mlx-vlm, and nothing of mlxmm.

B images, H x W pixels, P patches, L positions, E features of the tower, D of the language model.
"""

import inspect
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models.base import InputEmbeddingsFeatures, install_auto_processor_patch, to_mlx
from mlx_vlm.models.llava.processing_llava import LlavaProcessor
from mlx_vlm.models.qwen3.config import ModelConfig as TextConfig
from mlx_vlm.models.qwen3.language import LanguageModel
from transformers import BatchFeature

__all__ = ["LanguageModel", "Model", "ModelConfig", "TextConfig", "VisionConfig", "VisionModel"]

ACTIVATIONS = {
    "quick_gelu": nn.gelu_fast_approx,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "linear": lambda x: x,
}


class Processor(LlavaProcessor):
    """mlx-vlm's own hands the options of texts ("padding") to the image processor too, which transformers 5 refuses."""

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """`images` and `text`, with one <image> a picture, to "input_ids" (B, L), their mask and "pixel_values"."""
        texts = [text] if isinstance(text, str) else list(text)
        pixels = {} if images is None else dict(self.image_processor(images, return_tensors="np"))
        if pixels:
            height, width = pixels["pixel_values"].shape[-2:]
            count = (height // self.patch_size) * (width // self.patch_size)
            texts = [one.replace(self.image_token, self.image_token * count) for one in texts]
        options = {name: kwargs[name] for name in ("padding", "padding_side", "add_special_tokens") if name in kwargs}
        return BatchFeature(data=to_mlx({**self.tokenizer(texts, **options), **pixels}))


install_auto_processor_patch("llava", Processor)


class _FromDict:
    @classmethod
    def from_dict(cls, values: dict):
        return cls(**{name: values[name] for name in inspect.signature(cls).parameters if name in values})


@dataclass
class VisionConfig(_FromDict):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    @property
    def has_class_token(self) -> bool:
        return self.model_type == "clip_vision_model"


@dataclass
class ModelConfig(_FromDict):
    text_config: TextConfig
    vision_config: VisionConfig
    model_type: str
    image_token_index: int
    vision_feature_layer: int
    vision_feature_select_strategy: str
    projector_hidden_act: str
    vocab_size: int = 0
    eos_token_id: int | list[int] | None = None


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        E = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(E, E) for _ in range(4))

    def __call__(self, x: mx.array) -> mx.array:
        B, L, E = x.shape
        heads = lambda y: y.reshape(B, L, self.num_heads, -1).transpose(0, 2, 1, 3)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.out_proj(mixed.transpose(0, 2, 1, 3).reshape(B, L, E))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = config.hidden_act
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        E, p = config.hidden_size, config.patch_size
        if config.has_class_token:
            self.class_embedding = mx.zeros(E)
        self.patch_embedding = nn.Conv2d(3, E, p, stride=p, bias=not config.has_class_token)
        num_positions = (config.image_size // p) ** 2 + config.has_class_token
        self.position_embedding = nn.Embedding(num_positions, E)

    def __call__(self, images: mx.array) -> mx.array:
        x = self.patch_embedding(images).flatten(1, 2)  # (B, P, E)
        if "class_embedding" in self:
            first = mx.broadcast_to(self.class_embedding, (len(x), 1, x.shape[-1]))
            x = mx.concatenate([first, x], axis=1)
        return x + self.position_embedding.weight


class VisionModel(nn.Module):
    """The tower of a CLIP or SigLIP, under the names that transformers' LLaVA gives its arrays."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        if config.has_class_token:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)

    def __call__(self, images: mx.array, layer: int) -> mx.array:
        """(B, H, W, 3) to the hidden states of `layer`, (B, L, E), counted as transformers does."""
        x = self.embeddings(images)
        x = self.pre_layrnorm(x) if "pre_layrnorm" in self else x
        for block in self.encoder.layers[: layer % (len(self.encoder.layers) + 1)]:
            x = block(x)
        return x


class Projector(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D = config.vision_config.hidden_size, config.text_config.hidden_size
        self.activation = config.projector_hidden_act
        self.linear_1, self.linear_2 = nn.Linear(E, D), nn.Linear(D, D)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(x)))


class Model(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionModel(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LanguageModel(config.text_config)

    def get_input_embeddings(self, input_ids: mx.array, pixel_values: mx.array | None = None, **kwargs):
        """Embedded tokens (B, L, D), with the projected patches in the places of the image tokens."""
        embedded = self.language_model.model.embed_tokens(input_ids)
        if pixel_values is None:
            return InputEmbeddingsFeatures(inputs_embeds=embedded)
        states = self.vision_tower(pixel_values.transpose(0, 2, 3, 1), self.config.vision_feature_layer)
        if self.config.vision_feature_select_strategy == "default":
            states = states[:, 1:]  # without the class token
        patches = self.multi_modal_projector(states).astype(embedded.dtype)
        patches = patches.reshape(-1, patches.shape[-1])
        is_image = (input_ids == self.config.image_token_index).reshape(-1)
        if is_image.sum().item() != len(patches):
            raise ValueError(f"{is_image.sum().item()} image tokens for {len(patches)} patches: one <image> a picture")
        place = mx.maximum(mx.cumsum(is_image.astype(mx.int32)) - 1, 0)  # of each position among the patches
        flat = mx.where(is_image[:, None], patches[place], embedded.reshape(-1, embedded.shape[-1]))
        return InputEmbeddingsFeatures(inputs_embeds=flat.reshape(embedded.shape))

    def __call__(self, input_ids, pixel_values=None, mask=None, cache=None, **kwargs):
        embedded = self.get_input_embeddings(input_ids, pixel_values).inputs_embeds
        return self.language_model(input_ids, cache=cache, inputs_embeds=embedded)

    @property
    def layers(self):
        return self.language_model.model.layers

    def sanitize(self, weights: dict) -> dict:
        """Patches as MLX has them, (E, p, p, 3); without what reads the tower's last state, which LLaVA does not."""
        unused = ("vision_tower.head.", "vision_tower.post_layernorm.")
        kept = {name: array for name, array in weights.items() if not name.startswith(unused)}
        kept = {name: array for name, array in kept.items() if not name.endswith("position_ids")}
        if self.config.text_config.tie_word_embeddings:
            kept.pop("language_model.lm_head.weight", None)
        patch = "vision_tower.embeddings.patch_embedding.weight"
        if kept[patch].shape[-1] != 3 or kept[patch].shape[1] == 3:
            kept[patch] = kept[patch].transpose(0, 2, 3, 1)
        return kept
