"""A transformer decoder over the features of a vision tower, read by cross-attention or as a prefix.

B sequences, P image positions, L text positions, D features of the decoder, E features of the tower, V vocabulary.
"""

import attrs
import mlx.core as mx
import mlx.nn as nn
from attrs.validators import ge, in_, lt

from mlxmm.compute import functional as F
from mlxmm.compute.cores import in_halves
from mlxmm.config import checked, option
from mlxmm.errors import UserError

READINGS = ("cross", "prefix")


@attrs.frozen(kw_only=True, field_transformer=checked)
class DecoderConfig:
    """Sizes of the decoder, and how it attends to the image."""

    reading: str = option(
        "cross",
        "cross: cross-attention to the image in every layer; prefix: image positions before the text",
        in_(READINGS),
    )
    hidden_size: int = option(96, "features of a position", ge(1))
    num_hidden_layers: int = option(3, "blocks", ge(1))
    num_attention_heads: int = option(4, "attention heads", ge(1))
    intermediate_size: int = option(384, "features inside the MLP", ge(1))
    dropout: float = option(0.0, "fraction of features dropped after each attention and MLP", ge(0), lt(1))
    tie_word_embeddings: bool = option(True, "use the token embeddings as the head")

    def __attrs_post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} does not divide into {self.num_attention_heads} heads")


class LayerCache:
    """A layer's cache of past positions: `state` maps names to (B, heads, positions, D / heads)."""

    def __init__(self):
        self.state: dict[str, mx.array] = {}

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the keys and values of new positions; return those of all positions."""
        if self.state.get("keys") is not None:
            keys = mx.concatenate([self.state["keys"], keys], axis=2)
            values = mx.concatenate([self.state["values"], values], axis=2)
        self.state |= {"keys": keys, "values": values}
        return keys, values


class Attention(nn.Module):
    """Multi-head attention over keys and values that the caller gives, of the same sequence or another."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def keys_and_values(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(B, L, D) to two of (B, heads, L, D / heads)."""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def __call__(self, x: mx.array, keys: mx.array, values: mx.array, mask=None) -> mx.array:
        queries = self._heads(self.q_proj(x))
        mixed = F.attention(queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask)
        return self.out_proj(mixed.transpose(0, 2, 1, 3).reshape(x.shape))

    def _heads(self, x: mx.array) -> mx.array:
        B, L, _ = x.shape
        return x.reshape(B, L, self.num_heads, -1).transpose(0, 2, 1, 3)


class Block(nn.Module):
    """Pre-norm block: self-attention, cross-attention if `reading` is "cross", and an MLP."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        D = config.hidden_size
        self.self_norm, self.self_attention = nn.LayerNorm(D), Attention(config)
        if config.reading == "cross":
            self.cross_norm, self.cross_attention = nn.LayerNorm(D), Attention(config)
        self.mlp_norm = nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, config.intermediate_size), nn.Linear(config.intermediate_size, D)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(self, x: mx.array, image: mx.array | None, mask, cache: LayerCache | None) -> mx.array:
        x = x + self.dropout(self._self_attend(self.self_norm(x), mask, cache))
        if "cross_attention" in self:
            x = x + self.dropout(self._cross_attend(self.cross_norm(x), image, cache))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.mlp_norm(x)))))

    def _self_attend(self, x: mx.array, mask, cache: LayerCache | None) -> mx.array:
        keys, values = self.self_attention.keys_and_values(x)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        return self.self_attention(x, keys, values, mask)

    def _cross_attend(self, x: mx.array, image: mx.array | None, cache: LayerCache | None) -> mx.array:
        cached = {} if cache is None else cache.state
        if "image_keys" in cached:
            keys, values = cached["image_keys"], cached["image_values"]
        else:
            keys, values = self.cross_attention.keys_and_values(image)
            cached |= {"image_keys": keys, "image_values": values}
        return self.cross_attention(x, keys, values)


class Decoder(nn.Module):
    """Tokens and an image to logits: every position attends to the image and, causally, to the tokens."""

    def __init__(self, config: DecoderConfig, *, image_width: int, vocab_size: int, max_positions: int):
        super().__init__()
        self.config, self.max_positions = config, max_positions
        D = config.hidden_size
        self.image_projection, self.image_norm = nn.Linear(image_width, D), nn.LayerNorm(D)
        self.token_embedding = nn.Embedding(vocab_size, D)
        self.position_embedding = nn.Embedding(max_positions, D)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.LayerNorm(D)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """As GPT-2: embeddings with standard deviations 0.02 and 0.01; the sum of branches keeps its variance."""
        branches = 2 * len(self.layers)
        self.token_embedding.weight = mx.random.normal(self.token_embedding.weight.shape, scale=0.02)
        self.position_embedding.weight = mx.random.normal(self.position_embedding.weight.shape, scale=0.01)
        for layer in self.layers:
            attentions = [child for name, child in layer.items() if name.endswith("attention")]
            for last in (*(attention.out_proj for attention in attentions), layer.fc2):
                last.weight = last.weight * branches**-0.5

    def read(self, features: mx.array) -> mx.array:
        """(B, P, E) features of a tower to (B, P, D) image positions."""
        return self.image_norm(self.image_projection(features.astype(self.image_projection.weight.dtype)))

    def hidden_states(self, image: mx.array, text: mx.array, caches: list[LayerCache] | None = None) -> mx.array:
        """(B, P, D) image positions and (B, L, D) embedded tokens to normalised states (B, L, D).

        `caches` keep what `continued` needs. Raises `UserError` if there are more tokens than positions.
        """
        self._check_length(text.shape[1])
        text = text + self.position_embedding(mx.arange(text.shape[1]))
        if self.config.reading == "cross":
            return self.norm(self._run(text, image, "causal", caches))
        P, L = image.shape[1], text.shape[1]
        return self.norm(self._run(mx.concatenate([image, text], axis=1), None, prefix_mask(P, L), caches)[:, P:])

    def continued(self, text: mx.array, start: int, caches: list[LayerCache]) -> mx.array:
        """The embedded token (B, 1, D) at text position `start` to its normalised state (B, 1, D)."""
        self._check_length(start + 1)
        return self.norm(self._run(text + self.position_embedding(mx.array([start])), None, None, caches))

    def head(self, states: mx.array) -> mx.array:
        """(..., D) states to logits (..., V)."""
        return self.lm_head(states) if "lm_head" in self else self.token_embedding.as_linear(states)

    def __call__(self, image: mx.array, tokens: mx.array) -> mx.array:
        """(B, P, D) image positions and (B, L) tokens to logits (B, L, V)."""
        return self.head(self.hidden_states(image, self.token_embedding(tokens)))

    def _check_length(self, length: int) -> None:
        if length > self.max_positions:
            raise UserError(
                f"the decoder has {self.max_positions} positions, but start token, prompt and caption have {length} "
                "tokens: shorten the prompt, or train with a larger --module.max-new-tokens"
            )

    def _run(self, x: mx.array, image: mx.array | None, mask, caches: list[LayerCache] | None) -> mx.array:
        if caches is None:
            read = () if image is None else (image,)
            return in_halves(lambda x, image=None: self._run(x, image, mask, [None] * len(self.layers)), x, *read)
        for layer, cache in zip(self.layers, caches):
            x = layer(x, image, mask, cache)
        return x


class CachedDecoder:
    """The decoder as a `DecoderInterface`: the first call of `logits` begins with `num_image` image positions."""

    def __init__(self, decoder: Decoder, num_image: int):
        self.decoder, self.num_image = decoder, num_image

    def make_cache(self, num_positions: int = 1) -> list[LayerCache]:
        return [LayerCache() for _ in self.decoder.layers]

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, L) tokens to (B, L, D)."""
        return self.decoder.token_embedding(tokens)

    def logits(self, embeddings: mx.array, cache: list[LayerCache]) -> mx.array:
        """(B, P + L, D) in the first call, then (B, 1, D), to the logits (B, V) of the next token."""
        if not cache[0].state:
            image, text = embeddings[:, : self.num_image], embeddings[:, self.num_image :]
            states = self.decoder.hidden_states(image, text, cache)
        else:
            num_cached = cache[0].state["keys"].shape[2]
            is_prefix = self.decoder.config.reading == "prefix"
            states = self.decoder.continued(embeddings, num_cached - self.num_image * is_prefix, cache)
        return self.decoder.head(states[:, -1])


def prefix_mask(num_image: int, num_text: int) -> mx.array:
    """Attention mask (P + L, P + L), booleans: image rows attend to the image alone, text rows to all before them."""
    place = mx.arange(num_image + num_text)
    return (place[None] < num_image) | (place[None] <= place[:, None])
