"""Decoding: what must be equal is, on a tiny random Qwen3 and on a network of our own that keeps no keys."""

import itertools
import math

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import blas_threads
from mlx.utils import tree_flatten
from PIL import Image

from mlxmm.compute import cores, linux_blas
from mlxmm.errors import UserError
from mlxmm.modules.qwen3_aligner import Qwen3Aligner, Qwen3AlignerConfig
from mlxmm.networks.clip import CLIPVisionTower, VisionConfig
from mlxmm.networks.generation import GenerationConfig, _choose, beam_search, generate, sequence_keys, stream
from mlxmm.networks.language_model import (
    CachedLanguageModel,
    Qwen3Config,
    build_language_model,
    hidden_states,
    keep_likeliest,
)
from mlxmm.networks.projector import Projector, pixel_shuffle
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer

D, STOP = 16, 0


def tiny_lm(vocab_size):
    mx.random.seed(3)
    small = Qwen3Config(hidden_size=D, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2)
    values = attrs.asdict(attrs.evolve(small, num_key_value_heads=1, head_dim=32))
    hub = {"model_type": "qwen3", "vocab_size": vocab_size, "tie_word_embeddings": True, **values}
    model = build_language_model(hub)
    mx.random.seed(5)
    model.model.embed_tokens.weight = mx.random.normal((vocab_size, D))
    for layer in model.layers:  # large weights: what comes next depends on what came before
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight = 4 * mx.random.normal(part.weight.shape)
    return CachedLanguageModel(model)


class Recomputing(nn.Module):
    """The same network without keys and values: its cache is all embeddings so far. It fulfils `DecoderInterface`."""

    def __init__(self, network):
        super().__init__()
        self.network, self.batch_sizes = network, []

    def make_cache(self, num_positions=1):
        return [Past()]

    def embed(self, tokens):
        return self.network.embed(tokens)

    def logits(self, embeddings, cache):
        self.batch_sizes.append(len(embeddings))
        past = cache[0].state
        cache[0].state = {"all": embeddings if past is None else mx.concatenate([past["all"], embeddings], axis=1)}
        return self.network.logits(cache[0].state["all"], self.network.make_cache())


class Past:
    state = None


@pytest.fixture(scope="module")
def network():
    return tiny_lm(12)


@pytest.fixture(scope="module")
def prefix():
    return mx.random.normal((5, 4, D), key=mx.random.key(1))


WAYS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.7},
    "sampled": {"temperature": 1.3, "seed": 4},
    "top": {"temperature": 1.5, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.2},
    "beams": {"num_beams": 3},
    "long beams": {"num_beams": 4, "length_penalty": 2.0, "repetition_penalty": 1.5},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@ways
def test_a_batch_equals_its_rows_one_by_one(network, prefix, way):
    config = GenerationConfig(max_new_tokens=9, **way)
    keys = sequence_keys(config.seed, range(5))
    together = generate(network, prefix, config, stop_id=STOP)
    alone = [generate(network, prefix[i : i + 1], config, stop_id=STOP, keys=keys[i : i + 1])[0] for i in range(5)]
    assert together == alone
    assert len(set(map(len, together))) > 1 or way, "no row stops before another: the test shows little"


@ways
def test_the_cache_equals_recomputing(network, prefix, way):
    config, recomputing = GenerationConfig(max_new_tokens=9, **way), Recomputing(network)
    assert generate(network, prefix, config, stop_id=STOP) == generate(recomputing, prefix, config, stop_id=STOP)
    assert len(recomputing.batch_sizes) > 1


@pytest.mark.parametrize(
    ("way", "chosen"), [({}, [3, 3, 0, 3, 1]), (WAYS["sampled"], [1, 3, 0, 1, 2])], ids=["greedy", "sampled"]
)
def test_rows_that_have_stopped_are_no_longer_computed(network, prefix, way, chosen):
    config, recomputing = GenerationConfig(max_new_tokens=9, **way), Recomputing(network)
    keys = sequence_keys(config.seed, chosen)
    rows = generate(recomputing, prefix[mx.array(chosen)], config, stop_id=STOP, keys=keys)
    stops = len(rows[0]) + 1  # the step in which three of five rows stop
    assert sorted(map(len, rows)) == [stops - 1] * 3 + [9, 9]
    # The step after it was dispatched before they were known to have stopped.
    assert recomputing.batch_sizes == [5] * (stops + 1) + [2] * (8 - stops)


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_one_beam_is_greedy(network, prefix, penalty):
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=penalty)
    assert beam_search(network, prefix, config, stop_id=STOP) == generate(network, prefix, config, stop_id=STOP)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_sequences(length_penalty):
    V, longest = 4, 3
    network, prefix = tiny_lm(V), mx.random.normal((2, 2, D), key=mx.random.key(7))
    config = GenerationConfig(max_new_tokens=longest, num_beams=V**longest, length_penalty=length_penalty)
    found = generate(network, prefix, config, stop_id=STOP)
    for row, best in zip(prefix, found):
        assert best == exhaustive_search(network, row, V, longest, length_penalty)


def exhaustive_search(network, prefix, V, longest, length_penalty):
    """The best of every sequence that ends with STOP, or is as long as may be: each scored in one pass."""
    words = range(V)
    inner = [s for n in range(longest) for s in itertools.product([w for w in words if w != STOP], repeat=n)]
    every = [(*s, STOP) for s in inner] + [(*s, w) for s in inner if len(s) == longest - 1 for w in words if w != STOP]
    scores = {s: log_probability(network, prefix, s) / len(s) ** length_penalty for s in every}
    return [word for word in max(scores, key=scores.get) if word != STOP]


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
def test_beams_are_those_of_a_search_that_scores_every_candidate_from_scratch(network, prefix, length_penalty):
    K, longest = 3, 9  # shorter ones hide a cache whose rows are not those of their beams
    config = GenerationConfig(max_new_tokens=longest, num_beams=K, length_penalty=length_penalty)
    found = generate(network, prefix, config, stop_id=STOP)
    assert found == [plain_beam_search(network, row, STOP, K, longest, length_penalty) for row in prefix]


def plain_beam_search(network, prefix, stop_id, K, longest, length_penalty=1.0):
    totals, beams, complete = {(): 0.0}, [()], []
    score = lambda c: totals[c] / len(c) ** length_penalty
    while beams and (len(complete) < K or score(beams[0]) > score(complete[-1])):
        following = {beam: next_log_probabilities(network, prefix, beam) for beam in beams}
        new = {(*beam, word): totals[beam] + x for beam in beams for word, x in enumerate(following[beam])}
        candidates, totals = sorted(new, key=lambda c: -new[c])[: 2 * K], totals | new
        is_end = lambda c: c[-1] == stop_id or len(c) == longest
        complete = sorted([*complete, *(c for c in candidates[:K] if is_end(c))], key=lambda c: -score(c))[:K]
        beams = [c for c in candidates if not is_end(c)][:K]
    return [word for word in complete[0] if word != stop_id]


def log_probability(network, prefix, sequence):
    """Of `sequence` after `prefix` (L, D), each token from all before it, without a cache."""
    return sum(next_log_probabilities(network, prefix, sequence[:i])[word] for i, word in enumerate(sequence))


def next_log_probabilities(network, prefix, sequence) -> list[float]:
    """Of each token after `prefix` (L, D) and `sequence`."""
    parts = [prefix[None]] + ([network.embed(mx.array([sequence]))] if len(sequence) else [])
    logits = network.logits(mx.concatenate(parts, axis=1), network.make_cache())[0]
    return (logits - mx.logsumexp(logits)).tolist()


def test_a_length_penalty_makes_captions_longer(network, prefix):
    way = {"max_new_tokens": 32, "num_beams": 4}
    lengths = [
        sum(map(len, generate(network, prefix, GenerationConfig(**way, length_penalty=p), stop_id=STOP)))
        for p in (-2.0, 0.0, 3.0)
    ]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_top_k_and_top_p_keep_exactly_the_likeliest():
    logits = mx.log(mx.array([[0.05, 0.4, 0.15, 0.3, 0.1], [0.2, 0.2, 0.06, 0.5, 0.04]])) + 3
    kept = lambda **options: np.isfinite(np.array(keep_likeliest(logits, **options))).tolist()
    assert kept(top_k=2, top_p=1.0)[0] == [False, True, False, True, False]
    assert kept(top_k=0, top_p=0.8)[0] == [False, True, True, True, False]  # 0.4 + 0.3 is not yet 0.8
    assert kept(top_k=3, top_p=0.6)[0] == [False, True, False, True, False]  # of 0.4, 0.3, 0.15: 0.82 of it
    assert kept(top_k=1, top_p=1.0)[1] == kept(top_k=0, top_p=0.49)[1] == [False, False, False, True, False]
    assert kept(top_k=9, top_p=1.0)[0] == [True] * 5


def test_draws_have_the_probabilities_of_the_tempered_logits(network):
    prefix = mx.repeat(mx.random.normal((1, 3, D), key=mx.random.key(2)), 4_000, axis=0)
    config = GenerationConfig(max_new_tokens=1, temperature=2.0, top_k=4)
    rows = generate(network, prefix, config, stop_id=-1)
    counts = np.bincount([row[0] for row in rows], minlength=12) / len(rows)
    logits = network.logits(prefix[:1], network.make_cache())[0] / 2.0
    kept = mx.where(logits >= mx.sort(logits)[-4], logits, -mx.inf)
    assert np.abs(counts - np.array(mx.softmax(kept))).max() < 0.03  # four standard deviations


def test_draws_depend_on_the_seed_and_on_nothing_before(network, prefix):
    way = {"temperature": 2.0}
    drawn = lambda seed: generate(network, prefix, GenerationConfig(max_new_tokens=32, **way, seed=seed), stop_id=STOP)
    first = drawn(1)
    mx.random.uniform()
    assert drawn(1) == first != drawn(2)
    shorter = generate(network, prefix, GenerationConfig(max_new_tokens=4, **way, seed=1), stop_id=STOP)
    assert shorter == [row[:4] for row in first]


def test_a_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones():
    class Fixed:  # always the same logits, whatever came before
        def __init__(self, *logits):
            self.fixed = mx.array([logits])

        def make_cache(self, num_positions=1):
            return []

        def embed(self, tokens):
            return mx.zeros((*tokens.shape, 1))

        def logits(self, embeddings, cache):
            return self.fixed

    said = lambda *logits: generate(Fixed(*logits), mx.zeros((1, 1, 1)), config, stop_id=STOP)[0]
    config = GenerationConfig(max_new_tokens=4, repetition_penalty=2.0)
    # 3 -> 1.5; 2 -> 1; then 1.5 stays the largest: a token is penalised once, however often it came.
    assert said(-9.0, 3.0, 2.0, -0.5) == [1, 2, 1, 1]
    # -1 -> -2; -1.5 -> -3; then -2 stays the largest.
    assert said(-9.0, -1.0, -1.5, -4.0) == [1, 2, 1, 1]


def test_streamed_tokens_are_those_of_generate(network, prefix):
    for way in (WAYS["greedy"], WAYS["top"]):
        config = GenerationConfig(max_new_tokens=9, **way)
        expected = generate(network, prefix[:1], config, stop_id=STOP)[0]
        recomputing, seen = Recomputing(network), []
        for [token] in stream(recomputing, prefix[:1], config, stop_id=STOP):
            seen.append(token)
            # Each comes while the next one is computed, and before the one after it.
            assert len(recomputing.batch_sizes) == min(len(seen) + 1, 9)
        assert [token for token in seen if token is not None] == expected
        columns = list(stream(network, prefix, config, stop_id=STOP))
        together = [[token for token in row if token is not None] for row in zip(*columns)]
        assert together == generate(network, prefix, config, stop_id=STOP)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2, "temperature": 1.0}, "beam search does not sample"),
        ({"top_p": 0.9}, "set temperature above 0"),
        ({"top_k": 3}, "set temperature above 0"),
        ({"num_beams": 0}, "'num_beams' must be >= 1: 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "'top_p' must be > 0: 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**settings)


def test_a_network_without_a_module_must_be_told_how_long(network, prefix):
    for decode in (generate, lambda *rest, **named: list(stream(*rest, **named))):
        with pytest.raises(UserError, match="set max_new_tokens"):
            decode(network, prefix[:1], GenerationConfig(), stop_id=STOP)


def test_beams_cannot_be_streamed(network, prefix):
    with pytest.raises(UserError, match="set num_beams=1 to stream"):
        next(stream(network, prefix[:1], GenerationConfig(num_beams=2), stop_id=STOP))


# ---- captions


CAPTIONS = ["a red circle", "two small blue squares above a café", "it is a dog"]


def make_aligner(num_spare_rows=0, **settings):
    tokenizer = train_tokenizer(CAPTIONS, 300)
    mx.random.seed(0)
    lm = tiny_lm(len(tokenizer) + num_spare_rows).model
    vision = VisionConfig(image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = Qwen3AlignerConfig(layer=-1, projector_width=8, max_new_tokens=8, **settings)
    return Qwen3Aligner(config, CLIPVisionTower(vision), {}, ImageProcessor.square(16), lm, {}, tokenizer)


def pictures(n=4):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 16, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 5}], ids=str)
def test_captions_do_not_depend_on_how_many_are_decoded_at_a_time(monkeypatch, way):
    aligner, images = make_aligner(), pictures()
    together = aligner.caption(images, **way)
    monkeypatch.setattr("mlxmm.modules.captioning_module.BATCH", 3)
    assert aligner.caption(images, **way) == together and len(set(together)) > 1


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=str)
def test_the_cache_holds_the_positions_that_are_read_and_stays_within_its_budget(monkeypatch, way):
    aligner, images, made = make_aligner(), pictures(7), []
    together = aligner.caption(images, **way)

    class Watched(CachedLanguageModel):
        def make_cache(self, num_positions=1):
            made.append(super().make_cache(num_positions))
            return made[-1]

    network = aligner.language_model.args
    position = 2 * network.num_hidden_layers * network.num_key_value_heads * network.head_dim * 4  # bytes of float32
    caption = (16 + 8 - 1) * position * way.get("num_beams", 1)  # patches and tokens, the last of which is not read
    monkeypatch.setattr(Qwen3Aligner, "decoder", property(lambda self: Watched(self.language_model)))
    monkeypatch.setattr("mlxmm.modules.captioning_module.CACHE_BYTES", 3 * caption)
    with blas_threads(1):  # on two cores each half has a cache
        assert aligner.caption(images, **way) == together
    num_bytes = [sum(entry.keys.nbytes + entry.values.nbytes for entry in cache) for cache in made[1:]]
    assert len(num_bytes) == 3 and max(num_bytes) <= 3 * caption
    assert way or num_bytes == [3 * caption, 3 * caption, caption]


@pytest.mark.skipif(linux_blas.num_threads() is None, reason="MLX has a BLAS of its own here")
@pytest.mark.parametrize(("num_beams", "num_pictures", "expected"), [(1, 4, 1), (3, 4, 2), (1, 1, 2)])
def test_products_of_a_large_captioner_keep_their_threads_where_it_does_not_decode_halves(
    monkeypatch, num_beams, num_pictures, expected
):
    aligner, seen = make_aligner(), []

    class Watched(CachedLanguageModel):
        def embed(self, tokens):
            seen.append(linux_blas.num_threads())
            return super().embed(tokens)

    monkeypatch.setattr(cores, "SMALL", 0)
    monkeypatch.setattr(Qwen3Aligner, "decoder", property(lambda self: Watched(self.language_model)))
    with blas_threads(2):
        aligner.caption(pictures(num_pictures), num_beams=num_beams)
    assert set(seen) == {expected}


class Scripted:
    """A network that says what it was given to say."""

    def __init__(self, tokens, vocab_size):
        self.tokens, self.vocab_size = tokens, vocab_size

    def make_cache(self, num_positions=1):
        return [iter([*self.tokens, 0])]  # one more, which is computed and not read

    def embed(self, tokens):
        return mx.zeros((*tokens.shape, D))

    def logits(self, embeddings, cache):
        return mx.where(mx.arange(self.vocab_size) == next(cache[0]), 1.0, 0.0)[None]


def test_a_streamed_caption_comes_in_whole_letters():
    class Speaker(Qwen3Aligner):
        decoder = None

    aligner, text = make_aligner(), "a café ☃ above it"
    ids = aligner.tokenizer(text, add_special_tokens=False)["input_ids"]
    aligner.__class__ = Speaker
    Speaker.decoder = Scripted([*ids, aligner.stop_id], len(aligner.tokenizer))
    pieces = list(aligner.stream_caption(pictures(1)[0], max_new_tokens=40))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert any("☃" in piece for piece in pieces) and 4 < len(pieces) < len(ids) + 1  # three tokens, one letter


@pytest.mark.parametrize("way", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_a_streamed_caption_is_the_caption(way):
    aligner = make_aligner()
    for image in pictures():
        assert ["".join(aligner.stream_caption(image, **way))] == aligner.caption([image], **way)


def test_a_prompt_takes_the_place_of_the_trained_one():
    images = pictures()
    trained, other = make_aligner(prompt="it is"), make_aligner(prompt="a red")
    with pytest.warns(UserWarning, match="trained with 'it is': what it says after another"):
        replaced = trained.caption(images, prompt="a red")
    assert replaced == other.caption(images) != trained.caption(images)


def test_captioning_leaves_training_modes_as_they_were():
    aligner = make_aligner()
    aligner.vision.eval()
    aligner.caption(pictures(1))
    assert aligner.projector.training and not aligner.vision.training


# ---- what was wrong in the scripts that this grew out of


def test_labels_are_not_shifted_each_token_is_foretold_by_what_comes_before_it():
    aligner = make_aligner(prompt="it")
    batch = mapped(aligner.transform({"image": pictures(1)[0]}, "two small blue squares"))
    prefix, tokens = aligner.prefix(aligner.image_features(batch)), batch["tokens"][0].tolist()
    for i in range(4):
        only = batch | {"mask": (mx.arange(len(tokens)) == i)[None].astype(mx.float32)}
        expected = log_probability(aligner.decoder, prefix[0], tokens[: i + 1])
        expected -= log_probability(aligner.decoder, prefix[0], tokens[:i])
        assert aligner._measure(prefix, only)["loss"].item() == pytest.approx(-expected, abs=2e-3)


def test_one_end_is_learned_and_padding_is_not_though_both_are_the_same_token():
    aligner = make_aligner()
    short, cut = (aligner.transform({"image": pictures(1)[0]}, text) for text in ("a red circle", "dog " * 30))
    assert aligner.tokenizer.pad_token_id == aligner.stop_id
    ends = short["tokens"] == aligner.stop_id
    assert ends.sum() > 1 and (short["mask"] * ends).sum() == 1 and short["mask"][ends.argmax()] == 1
    assert cut["mask"].all() and cut["tokens"][-1] == aligner.stop_id and (cut["tokens"] == aligner.stop_id).sum() == 1


def test_the_optimizer_holds_what_is_trained_and_nothing_else(make_trainer, tmp_path):
    aligner = make_aligner()
    batch = mapped(aligner.transform({"image": pictures(1)[0]}, "a red circle"))
    make_trainer(max_steps=1, compile=False).fit(aligner, train_dataloaders=[batch])
    moments = {name.rsplit(".", 1)[0] for name, _ in tree_flatten(aligner.trainer.optimizer.state) if "layers" in name}
    assert moments == {name for name, _ in tree_flatten(aligner.projector.parameters(), prefix=".projector")}


def test_the_image_never_sees_the_caption():
    aligner = make_aligner()
    prefix, caption = mx.random.normal((1, 5, D)), mx.random.normal((1, 3, D))
    lm = aligner.language_model
    of_image = lambda text: hidden_states(lm, mx.concatenate([prefix, text], axis=1))[:, :5].sum()
    of_text = lambda text: hidden_states(lm, mx.concatenate([prefix, text], axis=1))[:, 5:].sum()
    assert mx.abs(mx.grad(of_image)(caption)).max() < 1e-20 and mx.abs(mx.grad(of_text)(caption)).max() > 0


def test_the_table_of_tokens_keeps_rows_that_the_tokenizer_has_no_use_for():
    aligner = make_aligner(num_spare_rows=37)
    rows = len(aligner.tokenizer) + 37
    assert aligner.language_model.model.embed_tokens.weight.shape == (rows, D)
    assert aligner.decoder.logits(mx.zeros((1, 2, D)), aligner.decoder.make_cache()).shape == (1, rows)


def mapped(example):
    return {name: mx.array(array)[None] for name, array in example.items()}


def test_pixel_shuffle_puts_the_patches_of_a_square_side_by_side():
    x = mx.arange(16).reshape(1, 16, 1)  # 4 x 4 patches, numbered row by row
    assert pixel_shuffle(x, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert Projector("pixel_shuffle", 3, 0, 5, factor=4)(mx.zeros((2, 16, 3))).shape == (2, 1, 5)


@pytest.mark.parametrize("kind", ["linear", "mlp", "pixel_shuffle"])
def test_every_projector_trains_and_captions(kind):
    aligner = make_aligner(projector=kind)
    batch = mapped(aligner.transform({"image": pictures(1)[0]}, "a red circle"))
    loss, grads = nn.value_and_grad(aligner, lambda: aligner.training_step(batch)["loss"])()
    assert mx.isfinite(loss) and all(mx.abs(layer["weight"]).sum() > 0 for layer in grads["projector"]["layers"])
    assert aligner.prefix(aligner.features(mx.zeros((2, 16, 16, 3)))).shape == (
        2,
        4 if kind == "pixel_shuffle" else 16,
        D,
    )
    assert len(aligner.caption(pictures(2))) == 2


@pytest.mark.parametrize(
    ("num_patches", "factor", "message"),
    [(12, 2, "12 is no square number"), (49, 2, "does not divide the 7 patches of a side: choose one of 1, 7")],
)
def test_patches_that_do_not_fit_are_named(num_patches, factor, message):
    with pytest.raises(UserError, match=message):
        pixel_shuffle(mx.zeros((1, num_patches, 2)), factor)
    if num_patches == 49:
        return
    with pytest.raises(UserError, match="projector_factor 3 does not divide the 4 patches"):
        make_aligner(projector="pixel_shuffle", projector_factor=3)


def test_a_temperature_near_zero_is_greedy_and_a_penalty_that_is_no_number_is_refused():
    logits, keys = mx.array([[1.0, 1.5, -2.0], [3.0, 2.9, 0.0]]), sequence_keys(0, [0, 1])
    for temperature in (1e-40, 1e-30, 1e-12):
        assert _choose(logits, GenerationConfig(temperature=temperature), keys).tolist() == [1, 0]
    for penalty in (math.nan, math.inf):
        with pytest.raises(UserError, match="is not a finite number"):
            GenerationConfig(length_penalty=penalty)
