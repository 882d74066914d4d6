"""CLIP's loss and temperature, patch dropout, the locked tower, random crops: each against what it is said to be."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from small_clip import SIGLIP, pairs, small_clip

from mlxmm.compute.dropout import PatchDropout
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.losses import clip_loss, duplicates, siglip_loss
from mlxmm.preprocessing.images import random_square


def softmax(x, axis):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


@pytest.mark.parametrize("size", [2, 3, 8, 17, 64])
def test_the_loss_and_its_gradient_are_those_of_the_paper(size):
    logits = np.random.default_rng(size).normal(size=(size, size)) * 8
    by_image, by_text = softmax(logits, 1), softmax(logits, 0)
    expected = -(np.log(np.diag(by_image)).mean() + np.log(np.diag(by_text)).mean()) / 2
    gradient = (by_image + by_text - 2 * np.eye(size)) / (2 * size)
    for step in (mx.value_and_grad(clip_loss), mx.compile(mx.value_and_grad(clip_loss))):
        loss, grad = step(mx.array(logits.astype(np.float32)))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(np.array(grad), gradient, atol=2e-6)


def test_the_loss_of_a_large_batch_that_knows_nothing_is_the_logarithm_of_its_size():
    assert clip_loss(mx.zeros((64, 64))).item() == pytest.approx(math.log(64), rel=1e-6)


def written_out(kind, logits, texts):
    """The loss over all pairs of a batch but those of different places with one text."""
    places = range(len(texts))
    kept = [[i == j or texts[i] != texts[j] for j in places] for i in places]
    if kind == "siglip":
        return sum(
            math.log1p(math.exp((1 - 2 * (i == j)) * logits[i][j])) for i in places for j in places if kept[i][j]
        ) / len(texts)
    row = lambda i: math.log(sum(math.exp(logits[i][j]) for j in places if kept[i][j])) - logits[i][i]
    column = lambda j: math.log(sum(math.exp(logits[i][j]) for i in places if kept[i][j])) - logits[j][j]
    return sum(row(i) + column(i) for i in places) / 2 / len(texts)


@pytest.mark.parametrize(("kind", "loss"), [("clip", clip_loss), ("siglip", siglip_loss)])
@pytest.mark.parametrize("texts", ["abcdef", "abacad", "aabbcc", "aaaaaa"])
def test_duplicates_that_are_masked_are_no_negatives(kind, loss, texts):
    logits = np.random.default_rng(len(set(texts))).normal(size=(6, 6)).astype(np.float32) * 4
    tokens = mx.array([[ord(text), 0] for text in texts])
    expected = written_out(kind, logits.astype(float), texts)
    for step in (mx.value_and_grad(loss), mx.compile(mx.value_and_grad(loss))):
        value, grad = step(mx.array(logits), duplicates(tokens))
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert np.abs(np.array(grad)[np.array(duplicates(tokens))]).max(initial=0) < 1e-8
    if len(set(texts)) == len(texts):
        assert value.item() == pytest.approx(loss(mx.array(logits)).item(), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, SIGLIP], ids=["clip", "siglip"])
def test_duplicates_are_masked_by_choice_and_right_either_way(settings):
    batch = {name: mx.array(np.concatenate([array, array])) for name, array in pairs(4).items()}
    plain, masked = (small_clip(**settings, mask_duplicates=masks).training_step(batch) for masks in (False, True))
    assert masked["loss"].item() < plain["loss"].item()
    assert masked["accuracy"].item() == plain["accuracy"].item()


@pytest.mark.parametrize(("before", "after"), [(5.0, math.log(100)), (3.0, 3.0)])
def test_logits_are_never_scaled_by_more_than_100(before, after, make_trainer):
    clip = small_clip()
    clip.network.logit_scale = mx.array(before)
    make_trainer(max_steps=1).fit(clip, train_dataloaders=[pairs(8)])
    scale = clip.network.logit_scale.item()
    assert scale != before and scale == pytest.approx(after, abs=1e-6 if after != before else 0.02)


def test_patch_dropout_keeps_the_class_token_and_other_patches_of_each_picture():
    x = mx.arange(17).reshape(1, 17, 1) + mx.zeros((6, 17, 2))
    layer = PatchDropout(0.75, num_first=1)
    kept = np.array(layer(x))[..., 0]
    assert kept.shape == (6, 5) and (kept[:, 0] == 0).all()
    assert all(len(set(row)) == 5 for row in kept) and len({tuple(row) for row in kept}) > 1
    again = [np.array(layer(x, mx.random.key(3))) for _ in range(2)]
    assert np.array_equal(*again) and not np.array_equal(again[0][..., 0], kept)
    assert PatchDropout(0.99)(x).shape == (6, 1, 2)
    layer.eval()
    assert mx.array_equal(layer(x), x)


@pytest.mark.parametrize(("settings", "num_first"), [({}, 1), (SIGLIP, 0)], ids=["clip", "siglip"])
def test_patches_are_left_out_in_training_alone(settings, num_first, make_trainer):
    clip = small_clip(**settings, patch_dropout=0.5)
    batch = pairs(6)
    make_trainer(max_steps=2).fit(clip, train_dataloaders=[batch])
    images = clip.processor.normalize(mx.array(batch["pixels"]))
    assert clip.training and clip.vision.hidden_states(images).shape == (6, num_first + 8, 16)
    clip.eval()
    assert clip.vision.hidden_states(images).shape == (6, num_first + 16, 16)
    assert not [name for name, _ in tree_flatten(clip.parameters()) if "dropout" in name]


@pytest.mark.parametrize("locked", ["vision", "text"])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_a_locked_tower_gets_no_gradient_and_stays_to_the_bit(locked, settings, chunk_size, make_trainer):
    clip = small_clip(locked=locked, chunk_size=chunk_size)
    before = dict(tree_flatten(clip.parameters()))
    make_trainer(max_steps=2, **settings).fit(clip, train_dataloaders=[pairs(6)])
    _, grads = nn.value_and_grad(clip, lambda batch: clip.training_step(batch)["loss"])(
        {name: mx.array(array) for name, array in pairs(6).items()}
    )
    names = {name for name, _ in tree_flatten(grads)}
    changed = {name for name, array in tree_flatten(clip.parameters()) if not mx.array_equal(array, before[name])}
    prefix = f"network.{locked}_model"
    assert names == {name for name in before if not name.startswith(prefix)}
    assert changed and not [name for name in changed if name.startswith(prefix)]
    assert f"network.{'visual' if locked == 'vision' else 'text'}_projection.weight" in changed


def test_a_random_square_is_the_largest_there_is_and_lies_anywhere():
    wide = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (10, 1)))
    lefts = set()
    for seed in range(200):
        pixels = np.asarray(random_square(wide, np.random.default_rng(seed)))
        assert pixels.shape == (10, 10) and (np.diff(pixels[0].astype(int)) == 1).all()
        lefts.add(int(pixels[0, 0]))
    assert lefts == set(range(31))


def test_crops_are_a_function_of_seed_epoch_and_place_and_no_picture_comes_twice_in_an_epoch():
    class Wide:
        """Rows of a picture 3 times as wide as high, each of a shade of its own along a ramp."""

        def __len__(self):
            return 24

        def __getitem__(self, i):
            ramp = np.tile(np.arange(24, dtype=np.uint8), (8, 1))
            pixels = np.stack([ramp, np.full_like(ramp, i), ramp], -1)
            return {"image": Image.fromarray(pixels), "captions": [f"{i}a", f"{i}b"], "id": str(i)}

    def transform(row, caption):
        assert row["image"].size == (8, 8)
        left, number = np.asarray(row["image"])[0, 0, :2]
        return {"number": np.array(number), "left": np.array(left), "caption": np.array(caption.endswith("b"))}

    def epochs(*numbers, start=0, random_crop=True):
        config = CaptionDataConfig(batch_size=6, random_crop=random_crop, shapes=ShapesConfig())
        data = CaptionData(open_source(config, 5), transform=transform)
        data.replace_rows("train", Wide())
        loader = data.train_dataloader()
        return [
            [{name: np.array(array) for name, array in batch.items()} for batch in loader.epoch(number, start)]
            for number in numbers
        ]

    one, two = epochs(0, 1)
    for epoch in (one, two):
        assert sorted(n for batch in epoch for n in batch["number"].tolist()) == list(range(24))
        assert len({left for batch in epoch for left in batch["left"].tolist()}) > 5
    lefts = [{n: left for b in epoch for n, left in zip(b["number"], b["left"])} for epoch in (one, two)]
    assert lefts[0] != lefts[1]
    (again,) = epochs(0, start=2)
    for expected, batch in zip(one[2:], again, strict=True):
        assert all(np.array_equal(expected[name], batch[name]) for name in batch)


def test_twins_of_a_text_in_a_batch_are_right_for_each_other():
    clip = small_clip()
    batch = pairs(4)
    twice = {name: np.concatenate([array, array]) for name, array in batch.items()}
    alone, both = (clip.training_step({k: mx.array(v) for k, v in b.items()})["accuracy"] for b in (batch, twice))
    assert float(both) == float(alone) > 0
