"""The caption decoder: who sees whom, and that a cache changes nothing."""

import mlx.core as mx
import numpy as np
import pytest

from mlxmm.errors import UserError
from mlxmm.networks.decoder import CachedDecoder, Decoder, DecoderConfig, prefix_mask

P, L, E, V = 5, 4, 12, 11


def make(reading: str, **settings) -> Decoder:
    mx.random.seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    config = DecoderConfig(reading=reading, **sizes, **settings)
    return Decoder(config, image_width=E, vocab_size=V, max_positions=L)


def inputs(batch: int = 3):
    tokens = mx.random.randint(0, V, (batch, L), key=mx.random.key(2))
    return mx.random.normal((batch, P, E), key=mx.random.key(1)), tokens


@pytest.mark.parametrize("reading", ["cross", "prefix"])
def test_a_position_sees_the_image_and_the_tokens_up_to_its_own(reading):
    decoder = make(reading)
    features, tokens = inputs()
    logits = decoder(decoder.read(features), tokens)
    other = mx.concatenate([tokens[:, :2], (tokens[:, 2:] + 1) % V], axis=1)
    changed = decoder(decoder.read(features), other)
    np.testing.assert_allclose(np.array(logits[:, :2]), np.array(changed[:, :2]), atol=1e-5)
    assert float(mx.abs(logits[:, 2:] - changed[:, 2:]).max()) > 1e-3
    elsewhere = decoder(decoder.read(features + 1), tokens)
    assert float(mx.abs(logits - elsewhere).min(axis=-1).max()) > 1e-4


def test_no_gradient_flows_from_the_image_rows_of_a_prefix_to_the_text():
    decoder = make("prefix")
    features, tokens = inputs()
    image, text = decoder.read(features), decoder.token_embedding(tokens)

    def image_rows(text):
        joined = mx.concatenate([image, text], axis=1)
        return mx.square(decoder._run(joined, None, prefix_mask(P, L), None)[:, :P]).sum()

    def text_rows(text):
        joined = mx.concatenate([image, text], axis=1)
        return mx.square(decoder._run(joined, None, prefix_mask(P, L), None)[:, P:]).sum()

    assert float(mx.abs(mx.grad(image_rows)(text)).max()) < 1e-20  # what is masked has a weight of 9e-27
    assert float(mx.abs(mx.grad(text_rows)(text)).max()) > 0


@pytest.mark.parametrize("reading", ["cross", "prefix"])
@pytest.mark.parametrize("tied", [True, False])
def test_decoding_with_a_cache_gives_the_logits_of_reading_all_at_once(reading, tied):
    decoder = make(reading, tie_word_embeddings=tied)
    features, tokens = inputs()
    whole = decoder(decoder.read(features), tokens)
    continuation = CachedDecoder(decoder, P)
    cache = continuation.make_cache()
    new = mx.concatenate([decoder.read(features), continuation.embed(tokens[:, :1])], axis=1)
    for i in range(L):
        step = continuation.logits(new, cache)
        np.testing.assert_allclose(np.array(step), np.array(whole[:, i]), atol=2e-5)
        new = continuation.embed(tokens[:, i + 1 : i + 2])


@pytest.mark.parametrize("reading", ["cross", "prefix"])
def test_a_text_longer_than_the_decoder_has_positions_for_is_one_clear_line(reading):
    decoder, (features, tokens) = make(reading), inputs()
    continuation = CachedDecoder(decoder, P)
    cache, new = continuation.make_cache(), mx.concatenate([decoder.read(features), continuation.embed(tokens)], axis=1)
    continuation.logits(new, cache)
    with pytest.raises(UserError, match="the decoder has 4 positions"):
        continuation.logits(continuation.embed(tokens[:, :1]), cache)
    with pytest.raises(UserError, match="caption have 5 tokens"):
        decoder(decoder.read(features), mx.concatenate([tokens, tokens[:, :1]], axis=1))


def test_a_head_of_its_own_is_one_more_matrix():
    from mlx.utils import tree_flatten

    names = [
        {name for name, _ in tree_flatten(make("cross", tie_word_embeddings=tied).parameters())}
        for tied in (True, False)
    ]
    assert names[1] - names[0] == {"lm_head.weight"}
