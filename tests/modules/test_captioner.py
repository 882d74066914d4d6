"""CaptionDecoder: what it learns, what it reads, and that it comes back from its folder the same."""

import attrs
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image
from small_modules import CAPTIONS, VISION, small_aligner, small_batch, tokenizer
from test_generation import plain_beam_search

from mlxmm import CaptionDecoder, Trainer, seed_everything
from mlxmm.data.loader import Loader
from mlxmm.errors import UserError
from mlxmm.losses import token_loss
from mlxmm.modules.caption_decoder import CaptionDecoderConfig, LayerMix
from mlxmm.networks.clip import CLIPVisionTower
from mlxmm.networks.decoder import DecoderConfig
from mlxmm.networks.generation import GenerationConfig, beam_search, generate, sequence_keys
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.images import ImageProcessor

SIZES = DecoderConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64)
KINDS = [("cross", {}), ("prefix", {"label_smoothing": 0.1}), ("cross", {"mix_layers": True})]


def make(reading: str = "cross", dropout: float = 0.0, **settings) -> CaptionDecoder:
    seed_everything(3)
    decoder = attrs.evolve(SIZES, reading=reading, dropout=dropout)
    settings = {
        "max_new_tokens": 8,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "layer": -1,
    } | settings
    config = CaptionDecoderConfig(decoder=decoder, **settings)
    tower = CLIPVisionTower(VISION)
    vision_config = {"model_type": "clip_vision_model"} | attrs.asdict(VISION)
    return CaptionDecoder(config, tower, vision_config, ImageProcessor.square(16), tokenizer(False))


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in CAPTIONS]


def fit(module, max_steps: int = 150) -> None:
    rows = [{"image": image, "captions": [text]} for image, text in zip(pictures(), CAPTIONS)]
    data = Loader(rows=rows, transform=lambda row, rng: module.transform(row, row["captions"][0]), batch_size=4)
    trainer = Trainer(max_steps=max_steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(module, train_dataloaders=data)


@pytest.mark.parametrize(
    ("reading", "settings"),
    [KINDS[0], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS[1:])],
    ids=["cross", "prefix, smoothed", "cross, a mix of layers"],
)
def test_it_learns_to_say_what_is_on_four_pictures_and_the_tower_stays(reading, settings):
    module = make(reading, **settings)
    before = {name: np.array(array) for name, array in tree_flatten(module.vision.parameters())}
    assert module.caption(pictures()) != CAPTIONS
    fit(module)
    assert module.caption(pictures()) == CAPTIONS
    assert module.caption(pictures()[::-1], num_beams=2) == CAPTIONS[::-1]
    assert all(np.array_equal(before[name], array) for name, array in tree_flatten(module.vision.parameters()))


@pytest.mark.parametrize("reading", ["cross", "prefix"])
def test_it_comes_back_from_its_folder_the_same(reading, tmp_path):
    module = make(reading, mix_layers=True)
    fit(module, 5)
    module.save_pretrained(tmp_path / "m")
    again = CaptionDecoder.from_pretrained(tmp_path / "m")
    batch = {name: mx.array(array) for name, array in small_batch(module).items()}
    assert mx.array_equal(module.validation_step(batch)["loss"], again.validation_step(batch)["loss"])
    assert again.caption(pictures()) == module.caption(pictures())


def test_the_control_gives_each_caption_another_picture():
    module = make()
    batch = {name: mx.array(array) for name, array in small_batch(module).items()}
    rolled = batch | {"pixels": mx.roll(batch["pixels"], 2, axis=0)}
    told = module.validation_step(batch)
    assert told["loss_shuffled"].item() == pytest.approx(module.validation_step(rolled)["loss"].item(), rel=1e-5)
    assert told["loss_shuffled"].item() != pytest.approx(told["loss"].item(), rel=1e-5)


def test_the_end_is_learned_and_padding_is_not():
    module = make()
    example = module.transform({"image": pictures()[0]}, "a blue circle")
    length = int(example["mask"].sum())
    assert example["tokens"][length - 1] == module.stop_id and not example["mask"][length:].any()
    batch = {name: mx.array(array[None]) for name, array in example.items()}
    changed = batch | {"tokens": mx.where(mx.array(example["mask"]) > 0, batch["tokens"], 7)}
    assert module.training_step(batch)["loss"].item() == module.training_step(changed)["loss"].item()
    long = module.transform({"image": pictures()[0]}, "a red square " * 9)
    assert long["tokens"][-1] == module.stop_id and long["mask"].all()


def test_batches_are_cut_to_buckets_and_measure_the_same():
    seed_everything(3)
    module = make(max_new_tokens=40)
    lengths = set()
    for caption in ("a red square", "a red square " * 4, "a red square " * 9):
        batch = {
            name: np.stack([array] * 2) for name, array in module.transform({"image": pictures()[0]}, caption).items()
        }
        cut = module.collate(batch)
        lengths.add(cut["tokens"].shape[1])
        told = [module.training_step({name: mx.array(x) for name, x in each.items()}) for each in (batch, cut)]
        assert told[0]["loss"].item() == pytest.approx(told[1]["loss"].item(), rel=1e-5)
        assert told[0]["weight"].item() == told[1]["weight"].item() == batch["mask"].sum()
    assert len(lengths) == 3 and all(length % 8 == 0 for length in lengths)


def test_label_smoothing_is_cross_entropy_with_spread_targets():
    logits = mx.random.normal((2, 3, 5), key=mx.random.key(0))
    targets, mask = mx.array([[0, 1, 2], [4, 3, 0]]), mx.array([[1.0, 1, 0], [1, 1, 1]])
    spread = 0.9 * mx.eye(5)[targets] + 0.1 / 5
    losses = -(spread * (logits - mx.logsumexp(logits, axis=-1, keepdims=True))).sum(-1)
    expected = (losses * mask).sum() / mask.sum()
    assert token_loss(logits, targets, mask, smoothing=0.1).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mix_starts_as_the_mean_of_normalised_layers():
    states = [mx.random.normal((2, 3, 8), key=mx.random.key(i)) * (i + 1) for i in range(3)]
    normal = [(x - x.mean(-1, keepdims=True)) / mx.sqrt(x.var(-1, keepdims=True) + 1e-5) for x in states]
    np.testing.assert_allclose(np.array(LayerMix(3, 8)(states)), np.array(sum(normal) / 3), atol=1e-5)


@pytest.mark.parametrize("reading", ["cross", "prefix"])
def test_captions_end_where_the_decoder_has_no_more_positions(reading):
    module = make(reading)
    module._stop_id = 1  # one that an untrained decoder hardly says
    together = module.caption(pictures(), max_new_tokens=99)  # would raise at the ninth position
    assert together[0] == "".join(module.stream_caption(pictures()[0], max_new_tokens=99)) != ""
    with pytest.warns(UserWarning, match="trained without a prompt: what it says after another text"):
        assert module.caption(pictures()[:1], prompt="a red")[0]
        with pytest.raises(UserError, match="the decoder has 8 positions"):
            module.caption(pictures()[:1], prompt="a red square " * 9)


KINDS_OF_CAPTIONERS = ["cross", "prefix", "aligner"]


def lively(kind: str):
    """A captioner of this kind with large random weights: what it says depends on the picture, and ends at its own
    time."""
    module = small_aligner() if kind == "aligner" else make(kind)
    mx.random.seed(11)
    module.update(tree_map(lambda x: x + 0.3 * mx.random.normal(x.shape), module.parameters()))
    module._stop_id = {"cross": 54, "prefix": 263, "aligner": 159}[kind]
    return module


def prefix_of(module) -> mx.array:
    return module.prefix(module.features(module.processor(pictures())))


@pytest.mark.parametrize("kind", KINDS_OF_CAPTIONERS)
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 4}], ids=str)
def test_a_batch_is_captioned_as_its_pictures_one_by_one(kind, way):
    module = lively(kind)
    prefix, config = prefix_of(module), GenerationConfig(max_new_tokens=8, **way)
    keys = sequence_keys(config.seed, range(4))
    together = generate(module.decoder, prefix, config, stop_id=module.stop_id, keys=keys)
    for i in range(4):
        alone = generate(module.decoder, prefix[i : i + 1], config, stop_id=module.stop_id, keys=keys[i : i + 1])
        assert alone == together[i : i + 1]
    assert len(set(map(tuple, together))) > 1
    assert way or len(set(map(len, together))) > 1  # one ends before another


@pytest.mark.parametrize("kind", KINDS_OF_CAPTIONERS)
def test_one_beam_is_greedy(kind):
    module, config = lively(kind), GenerationConfig(max_new_tokens=8)
    greedy = generate(module.decoder, prefix_of(module), config, stop_id=module.stop_id)
    assert beam_search(module.decoder, prefix_of(module), config, stop_id=module.stop_id) == greedy


@pytest.mark.parametrize("kind", KINDS_OF_CAPTIONERS)
def test_beams_are_those_of_a_search_that_reads_all_anew_at_every_step(kind):
    module, config = lively(kind), GenerationConfig(max_new_tokens=8, num_beams=3)
    found = generate(module.decoder, prefix_of(module), config, stop_id=module.stop_id)
    assert found == [plain_beam_search(module.decoder, row, module.stop_id, 3, 8) for row in prefix_of(module)]


@pytest.mark.parametrize("kind", KINDS_OF_CAPTIONERS)
def test_the_cache_equals_recomputing(kind):
    module, config = lively(kind), GenerationConfig(max_new_tokens=8)
    prefix, decoder = prefix_of(module), module.decoder
    said = np.array(generate(decoder, prefix, config, stop_id=-1))
    for i in range(8):
        read = mx.concatenate([prefix, decoder.embed(mx.array(said[:, :i]))], axis=1) if i else prefix
        assert np.array_equal(np.array(decoder.logits(read, decoder.make_cache()).argmax(-1)), said[:, i])


@pytest.mark.parametrize("reading", ["cross", "prefix"])
def test_labels_are_not_shifted_each_token_is_foretold_by_what_comes_before_it(reading):
    module = lively(reading)
    batch = {name: mx.array(x[None]) for name, x in module.transform({"image": pictures()[0]}, "a small red").items()}
    prefix, tokens = module.prefix(module.image_features(batch)), batch["tokens"]
    for i in range(3):
        read = mx.concatenate([prefix, module.decoder.embed(tokens[:, :i])], axis=1) if i else prefix
        logits = module.decoder.logits(read, module.decoder.make_cache())[0]
        only = batch | {"mask": (mx.arange(tokens.shape[1]) == i)[None].astype(mx.float32)}
        expected = (mx.logsumexp(logits) - logits[tokens[0, i]]).item()
        assert module.validation_step(only)["loss"].item() == pytest.approx(expected, abs=2e-3)


def test_the_optimizer_holds_the_decoder_and_nothing_of_the_tower():
    module = make()
    fit(module, 1)
    moments = {name for name, _ in tree_flatten(module.trainer.optimizer.state) if name.endswith((".m", ".v"))}
    assert moments and all(name.startswith("network.") for name in moments)


def test_a_folder_of_something_else_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="is not a CaptionDecoder: its config.json says 'clip'"):
        CaptionDecoder.from_pretrained(tmp_path)
