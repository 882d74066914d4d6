"""The head fused with its loss: the same numbers as plain cross-entropy, without the array of logits."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import on_cores
from mlx.utils import tree_flatten
from small_modules import CAPTIONS, VISION, small_aligner, tokenizer

from mlxmm import losses
from mlxmm.config import to_json
from mlxmm.losses import linear_token_loss
from mlxmm.modules import captioning_module, text_model
from mlxmm.modules import token_metrics as measures
from mlxmm.modules.caption_decoder import CaptionDecoder, CaptionDecoderConfig
from mlxmm.modules.text_model import TextModel, TextModelConfig
from mlxmm.networks.clip import CLIPVisionTower
from mlxmm.networks.language_model import Qwen3Config, build_language_model, embed, hidden_states
from mlxmm.preprocessing.images import ImageProcessor

B, L, D, V = 3, 7, 8, 50


@pytest.fixture
def case():
    mx.random.seed(0)
    mask = (mx.random.uniform(shape=(B, L)) < 0.6).astype(mx.float32)
    targets = mx.random.randint(0, V, (B, L))
    return 3 * mx.random.normal((B, L, D)), mx.random.normal((V, D)), targets, mask


def plain(states, weight, targets, mask):
    logits = states @ weight.T
    hits = (logits.argmax(-1) == targets) * mask
    loss = (nn.losses.cross_entropy(logits, targets) * mask).sum() / mask.sum()
    return loss, hits.sum() / mask.sum()


@pytest.fixture(params=[8 * V, 1_000 * V], ids=["chunks with a rest", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", request.param)


@pytest.mark.parametrize("num_cores", [1, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_loss_accuracy_and_both_gradients_equal_plain_cross_entropy(case, chunk, compiled, num_cores):
    states, weight, targets, mask = case
    wrap = mx.compile if compiled else lambda f: f
    # 2.5: a cotangent that is not one
    grads = lambda loss: wrap(
        mx.value_and_grad(lambda s, w, t, m: (2.5 * (out := loss(s, w, t, m))[0], out[1]), argnums=(0, 1))
    )
    (loss, accuracy), expected = grads(plain)(*case)
    (ours, hits), actual = on_cores(num_cores, lambda: grads(linear_token_loss)(*case))
    assert mx.allclose(ours, loss, atol=1e-5) and mx.allclose(hits, accuracy, atol=1e-6)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape and mx.abs(mine - theirs).max() < 1e-5 < mx.abs(theirs).max()


def test_where_nothing_counts_the_loss_is_zero_and_finite(case):
    states, weight, targets, mask = case
    loss, grad = mx.value_and_grad(lambda s: linear_token_loss(s, weight, targets, 0 * mask)[0])(states)
    assert loss.item() == 0 and mx.abs(grad).max() == 0


def test_logits_of_thousands_do_not_overflow(case):
    states, weight, targets, mask = case
    loss, grad = mx.value_and_grad(lambda s: linear_token_loss(s, 1e3 * weight, targets, mask)[0])(states)
    expected = plain(states, 1e3 * weight, targets, mask)[0]
    assert mx.allclose(loss, expected, rtol=1e-5) and mx.isfinite(grad).all()


def test_half_precision_keeps_its_type_and_its_loss_is_float32(case):
    states, weight, targets, mask = case
    half = states.astype(mx.bfloat16), weight.astype(mx.bfloat16)
    take = mx.value_and_grad(lambda s, w: linear_token_loss(s, w, targets, mask)[0], argnums=(0, 1))
    loss, grads = take(*half)
    expected, grads_32 = take(*(x.astype(mx.float32) for x in half))
    assert loss.dtype == mx.float32 and mx.allclose(loss, expected, rtol=2e-2)
    for grad, reference in zip(grads, grads_32):
        assert grad.dtype == mx.bfloat16 and mx.abs(grad.astype(mx.float32) - reference).max() < 2e-2


@pytest.mark.skipif(mx.cuda.is_available(), reason="cuBLAS takes tens of MiB for itself")
def test_memory_does_not_grow_with_the_number_of_positions(monkeypatch):
    wide = 20_000
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 4 * wide)
    weight = mx.random.normal((wide, D))

    def peak(loss, positions):
        states, ones = mx.random.normal((positions, D)), mx.ones(positions)
        mx.eval(weight, states, ones)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(lambda s: loss(s, weight, ones.astype(mx.int32), ones)[0])(states))
        return mx.get_peak_memory() - before

    fused = partial(linear_token_loss, for_weight=False)
    assert peak(plain, 256) > 256 * wide * 4  # all logits
    assert peak(fused, 256) < 1.2 * peak(fused, 64) < 256 * wide * 4 / 2


# ---- in the modules


def tiny_lm(tied):
    mx.random.seed(1)
    small = {"hidden_size": D, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    config = to_json(Qwen3Config(**small, num_key_value_heads=1, head_dim=4))
    return build_language_model({"model_type": "qwen3", "vocab_size": V, "tie_word_embeddings": tied, **config})


def grads_of(model, batch, fused, monkeypatch):
    monkeypatch.setattr(measures, "FUSED_FROM", 1 if fused else 10**9)

    def loss():
        states = hidden_states(model, embed(model, mx.roll(batch["tokens"], 1, axis=1)))
        out = measures.token_metrics(model, states, batch)
        return out["loss"], out["accuracy"], out["weight"]

    return nn.value_and_grad(model, loss)()


@pytest.mark.parametrize("positions", [False, True], ids=["all positions", "labelled positions"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "head frozen"])
def test_a_language_model_gets_the_same_gradients_either_way(case, monkeypatch, tied, frozen, positions):
    model, (_, _, targets, mask) = tiny_lm(tied), case
    if frozen:
        model.freeze()
        model.layers[0].unfreeze()
    batch = {"tokens": targets, "mask": mask}
    values, expected = grads_of(model, batch, False, monkeypatch)
    if positions:
        batch["positions"] = positions_of(mask)
        assert len(batch["positions"]) < B * L
    fused, actual = grads_of(model, batch, True, monkeypatch)
    assert np.allclose(values, fused, atol=1e-5)
    assert_same_gradients(actual, expected, 1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "head frozen"])
def test_a_plain_head_at_labelled_positions_gets_the_same_gradients(case, monkeypatch, frozen):
    model, (_, _, targets, mask) = tiny_lm(tied=True), case
    if frozen:
        model.freeze()
        model.layers[0].unfreeze()
    batch = {"tokens": targets, "mask": mask}
    values, expected = grads_of(model, batch, False, monkeypatch)
    picked, actual = grads_of(model, batch | {"positions": positions_of(mask)}, False, monkeypatch)
    assert np.allclose(values, picked, atol=1e-6)
    assert_same_gradients(actual, expected, 1e-6)


@pytest.mark.parametrize("kind", ["text", "decoder", "aligner"])
def test_a_collated_batch_gives_the_gradients_of_the_padded_one(kind, monkeypatch):
    for file in (measures, captioning_module, text_model):
        monkeypatch.setattr(file, "PICKED_FROM", 1, raising=False)
    module, batch = padded(kind)
    collated = module.collate(batch)
    assert len(collated["positions"]) < batch["mask"].size and collated["tokens"].shape < batch["tokens"].shape
    arrays = [{name: mx.array(array) for name, array in one.items()} for one in (batch, collated)]
    (loss, expected), (picked, actual) = (
        nn.value_and_grad(module, lambda one: module.training_step(one)["loss"])(one) for one in arrays
    )
    assert abs(loss.item() - picked.item()) < 1e-5
    assert_same_gradients(actual, expected, 1e-5)


def padded(kind: str) -> tuple:
    """A module and a batch of which less than half counts."""
    tokens, rng = tokenizer(kind != "text"), np.random.default_rng(0)
    if kind == "text":
        network = Qwen3Config(hidden_size=32, num_hidden_layers=2, intermediate_size=64)
        module = TextModel(TextModelConfig(network=network, max_tokens=32), tokens)
        examples = [module.transform(("a", caption)) for caption in CAPTIONS]
        return module, {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    if kind == "aligner":
        module = small_aligner()
    else:
        config = CaptionDecoderConfig(max_new_tokens=32)
        module = CaptionDecoder(config, CLIPVisionTower(VISION), {}, ImageProcessor.square(16), tokens)
    ids = rng.integers(2, 200, (4, 32)).astype(np.int32)
    mask = (np.arange(32) < np.array([[3], [9], [5], [12]])).astype(np.float32)
    pixels = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    return module, {"pixels": pixels, "tokens": ids, "mask": mask}


def positions_of(mask: mx.array) -> mx.array:
    return mx.array(measures.label_positions(np.array(mask)))


def assert_same_gradients(actual, expected, tolerance: float) -> None:
    expected, actual = (dict(tree_flatten(tree)) for tree in (expected, actual))
    assert expected.keys() == actual.keys() and len(actual) > 5
    for name in expected:
        assert mx.abs(expected[name] - actual[name]).max() < tolerance, name


@pytest.mark.parametrize("count", [0, 1, 8, 9, 63, 64])
def test_positions_are_all_that_count_and_of_few_different_numbers(count):
    mask = np.zeros(64, dtype=np.float32)
    mask[np.random.default_rng(count).permutation(64)[:count]] = 1
    places = measures.label_positions(mask.reshape(8, 8))
    assert mask[places].sum() == count and len(set(places.tolist())) == len(places)
    assert len(places) == max(1, -(-count // 8) * 8)


def test_a_head_with_a_bias_is_not_fused():
    model = tiny_lm(tied=False)
    model.lm_head = nn.Linear(D, V)
    assert measures.head_weight(model) is None and not measures.fuses_head(model)
