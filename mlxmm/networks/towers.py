"""What the towers of CLIP, SigLIP and ViT share: their sizes, embeddings, hidden states and names on the Hub.

B images or texts, H x W pixels, P patches, L tokens or class token and patches, D features of a tower.
"""

import math
from pathlib import Path

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs.validators import ge

from mlxmm.compute import functional as F
from mlxmm.compute.cores import in_halves
from mlxmm.config import checked, option
from mlxmm.errors import UserError
from mlxmm.networks.transformer import TransformerConfig

EMBEDDING_STD = 0.1  # of class, position and token embeddings, trained from scratch
CUBIC = -0.75  # PyTorch's bicubic kernel; Pillow's has -0.5


@attrs.frozen(kw_only=True, field_transformer=checked)
class VisionConfig(TransformerConfig):
    """A vision tower."""

    image_size: int = option(32, "side of the square image, in pixels", ge(1))
    patch_size: int = option(8, "side of one patch, in pixels", ge(1))

    @property
    def num_patches(self) -> int:
        """Of a picture of `image_size`, without the class token."""
        return (self.image_size // self.patch_size) ** 2


@attrs.frozen(kw_only=True, field_transformer=checked)
class TextConfig(TransformerConfig):
    """A text tower."""

    hidden_size: int = option(32, "features of a position", ge(1))
    num_hidden_layers: int = option(1, "blocks", ge(1))
    intermediate_size: int = option(128, "features inside the MLP", ge(1))
    vocab_size: int = option(512, "tokens", ge(1))
    max_position_embeddings: int = option(24, "longest text, in tokens", ge(2))
    eos_token_id: int = option(0, "token whose state is the text's feature; 2: the highest id", ge(0))


def check_layer(layer: int, depth: int) -> None:
    """Raise `UserError` where a tower of `depth` blocks has no such `hidden_states`."""
    if not -depth - 1 <= layer <= depth:
        raise UserError(
            f"layer {layer} of a tower with hidden states 0 to {depth}: choose one of these, or -1 to {-depth - 1}"
        )


class Tower(nn.Module):
    """Embeddings, then blocks. A subclass makes `config`, `embeddings` and `encoder`, and pools in `__call__`."""

    mask = None  # of the blocks

    def embed(self, inputs: mx.array) -> mx.array:
        """What enters the first block, (B, L, D)."""
        return self.embeddings(inputs)

    def hidden_states(self, inputs: mx.array, layer: int = -1) -> mx.array:
        """Images (B, H, W, 3) or tokens (B, L) to (B, L, D), not normalised.

        `layer` counts as transformers' `hidden_states` does: 0 is what enters the first block, -1 what leaves
        the last. Blocks behind it are not run.
        """
        depth = len(self.encoder.layers)
        check_layer(layer, depth)
        run = lambda rows: self.encoder(self.embed(rows), self.mask, num_layers=layer % (depth + 1))
        return in_halves(run, inputs)

    def all_hidden_states(self, inputs: mx.array) -> list[mx.array]:
        """The hidden states of all layers, from 0 to the last, in one pass."""
        return in_halves(self._all_hidden_states, inputs)

    def _all_hidden_states(self, inputs: mx.array) -> list[mx.array]:
        states = [self.embed(inputs)]
        for block in self.encoder.layers:
            states.append(block(states[-1], self.mask))
        return states


class VisionTower(Tower):
    """A tower whose positions are patches, after a class token if the embeddings have one."""

    def patches(self, images: mx.array, layer: int = -1) -> mx.array:
        """(B, H, W, 3) to (B, P, D): the hidden states of `layer` without the class token."""
        return self._without_class(self.hidden_states(images, layer))

    def all_patches(self, images: mx.array) -> list[mx.array]:
        """The `patches` of all layers, from 0 to the last, in one pass."""
        return [self._without_class(states) for states in self.all_hidden_states(images)]

    def _without_class(self, states: mx.array) -> mx.array:
        return states[:, int("class_embedding" in self.embeddings) :]


class VisionEmbeddings(nn.Module):
    """Patch and position embeddings; positions are interpolated if images differ from the config's size."""

    def __init__(self, config: VisionConfig, *, class_token: bool, bias: bool):
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        num_positions = (config.image_size // p) ** 2 + class_token
        if class_token:
            self.class_embedding = EMBEDDING_STD * mx.random.normal((D,))
        self.patch_embedding = PatchEmbedding(p, D, bias=bias)
        self.position_embedding = nn.Embedding(num_positions, D)
        self.position_embedding.weight = EMBEDDING_STD * mx.random.normal((num_positions, D))

    def __call__(self, images: mx.array) -> mx.array:
        x = self.patch_embedding(images)  # (B, rows, columns, D)
        B, rows, columns, D = x.shape
        x = x.reshape(B, rows * columns, D)
        if "class_embedding" in self:
            x = mx.concatenate([mx.broadcast_to(self.class_embedding, (B, 1, D)), x], axis=1)
        x = x + self.positions(rows, columns)
        return self.patch_dropout(x) if "patch_dropout" in self else x

    def positions(self, rows: int, columns: int) -> mx.array:
        """The position embeddings, (L, D), of a picture of `rows` times `columns` patches."""
        table = self.position_embedding.weight
        first = int("class_embedding" in self)
        side = math.isqrt(len(table) - first)
        if (rows, columns) == (side, side):
            return table
        down, across = mx.array(bicubic(side, rows)), mx.array(bicubic(side, columns))
        grid = mx.einsum("ri,cj,ijd->rcd", down, across, table[first:].reshape(side, side, -1))
        return mx.concatenate([table[:first], grid.reshape(rows * columns, -1)])


class PatchEmbedding(nn.Module):
    """A convolution of kernel and stride `patch_size`, as one matrix product: half the time of MLX's on a CPU."""

    def __init__(self, patch_size: int, hidden_size: int, *, bias: bool):
        super().__init__()
        scale = 1 / math.sqrt(3 * patch_size * patch_size)
        shape = (hidden_size, patch_size, patch_size, 3)  # MLX's order of a convolution's weights
        self.weight = mx.random.uniform(-scale, scale, shape)
        if bias:
            self.bias = mx.zeros(hidden_size)

    def __call__(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) to (B, rows, columns, D). Pixels that do not fill a patch are dropped, as transformers does."""
        D, p = self.weight.shape[:2]
        B, H, W, C = images.shape
        rows, columns = H // p, W // p
        if rows * columns == 0:
            raise UserError(f"images are {H}x{W} pixels, smaller than a patch of {p}x{p}")
        images = images[:, : rows * p, : columns * p].astype(
            self.weight.dtype
        )  # float32 pixels would make all that follows float32
        x = images.reshape(B, rows, p, columns, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, rows, columns, -1)
        x = F.matmul(x, self.weight.reshape(D, -1).T)
        return x + self.bias if "bias" in self else x


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            table.weight = EMBEDDING_STD * mx.random.normal(table.weight.shape)

    def __call__(self, tokens: mx.array) -> mx.array:
        L, longest = tokens.shape[1], len(self.position_embedding.weight)
        if L > longest:
            raise UserError(f"texts of {L} tokens are longer than the {longest} that the tower was made for")
        return self.token_embedding(tokens) + self.position_embedding.weight[:L]


def bicubic(num_in: int, num_out: int) -> np.ndarray:
    """The matrix (num_out, num_in) that PyTorch's bicubic `interpolate` multiplies an axis with."""
    centres = (np.arange(num_out) + 0.5) * num_in / num_out - 0.5
    matrix = np.zeros((num_out, num_in), dtype=np.float32)
    for tap in range(-1, 3):
        positions = np.floor(centres).astype(int) + tap
        x = np.abs(centres - positions)
        near = (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
        far = CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(matrix, (np.arange(num_out), positions.clip(0, num_in - 1)), np.where(x <= 1, near, far))
    return matrix


def l2_normalize(x: mx.array) -> mx.array:
    """Scale rows to unit length, in float32: bfloat16 rounding, divided by a temperature of 0.01, is half a logit."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt(mx.square(x).sum(-1, keepdims=True))


def tower_values(values: dict, tower: str, folder: Path) -> dict:
    """What the `config.json` of a pair of towers says of one, "vision" or "text"; as `CLIPConfig` of transformers has
    it, an older "text_config_dict" wins. Raises `UserError` if that is no object."""
    older = values.get(f"{tower}_config_dict") if values.get("model_type", "clip") == "clip" else None
    own = (values.get(f"{tower}_config") or {}) if older is None else older
    if not isinstance(own, dict):
        raise UserError(f"{folder / 'config.json'} is damaged: its {tower}_config is no object")
    return own


def config_from_hub(cls: type, values: dict, defaults: dict):
    """Build `cls` from a config.json, ignoring other keys; `defaults` are what transformers takes for settings that are
    left out, or null. Raises `UserError` for values that it refuses."""
    values = defaults | {name: value for name, value in values.items() if value is not None}
    names = {field.name for field in attrs.fields(cls)}
    try:
        return cls(**{name: value for name, value in values.items() if name in names})
    except (ValueError, TypeError) as error:
        raise UserError(f"config.json describes an unsupported tower: {error.args[0]}") from None


def from_hub(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """A Hub checkpoint's arrays in our layout: patches as (D, p, p, C), no position ids."""
    kept = {name: array for name, array in weights.items() if not name.endswith("position_ids")}
    return {name: a.transpose(0, 2, 3, 1) if _is_patch(name, a) else a for name, a in kept.items()}


def to_hub(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The inverse of `from_hub`."""
    return {name: a.transpose(0, 3, 1, 2) if _is_patch(name, a) else a for name, a in weights.items()}


def _is_patch(name: str, array: mx.array) -> bool:
    return name.endswith("patch_embedding.weight") and array.ndim == 4
