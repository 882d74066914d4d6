"""CLIP, SigLIP and ViT against transformers: stored numbers, and where torch is installed, live.

`tools/make_parity_fixtures.py` wrote the numbers.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import PIL
import pytest
from PIL import Image

from mlxmm import ContrastiveCLIP
from mlxmm.errors import UserError
from mlxmm.modules.contrastive_clip import LOSSES
from mlxmm.networks.pretrained_vision import load_vision_tower, save_vision_tower
from mlxmm.preprocessing.images import ImageProcessor

FIXTURES = Path(__file__).parents[1] / "fixtures"
PAIRS = ["clip-quick-gelu-patch4", "clip-gelu-patch8", "siglip"]
STORED = [*PAIRS, "vit"]
LIVE = [*STORED, "vit-classifier"]
TEXTS = ["a small red circle", "a blue square far above it"]
OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
PICTURES = [(25, 17), (10, 31)]  # width and height
live = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def pictures(seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in PICTURES]


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-4


def assert_same_pictures(ours, theirs):
    """Pillow before 13 gives some colours of a resized picture of noise another of 256 values."""
    assert ours.shape == theirs.shape
    assert np.abs(np.array(ours) - np.array(theirs)).max() < (0.1 if OLD_PILLOW else 1e-4)


def check_vision(folder: Path, theirs: dict, seed: int = 0) -> None:
    tower, values = load_vision_tower(folder)
    assert_same_pictures(ImageProcessor.from_pretrained(folder)(pictures(seed)), images := theirs["pixels"])
    depth = tower.config.num_hidden_layers
    for layer in range(depth + 1):
        assert_close(tower.hidden_states(images, layer), theirs[f"vision.{layer}"])
        assert_close(tower.hidden_states(images, layer - depth - 1), theirs[f"vision.{layer}"])
    first = 0 if "siglip" in values["model_type"] else 1
    assert_close(tower.patches(images, 1), theirs["vision.1"][:, first:])
    assert_close(tower.hidden_states(theirs["large"]), theirs["vision_large"])
    if "class_token" in theirs:
        assert_close(tower(images), theirs["class_token"])


def check_pair(folder: Path, theirs: dict, seed: int = 0) -> None:
    clip = ContrastiveCLIP.from_pretrained(folder)
    assert_same_pictures(clip.preprocess(pictures(seed)), images := theirs["pixels"])
    tokens = clip.tokenize(TEXTS)
    assert np.array_equal(tokens, theirs["tokens"])
    for layer in range(clip.config.text.num_hidden_layers + 1):
        states = clip.network.text_model.hidden_states(tokens, layer)
        assert_close(states, theirs[f"text.{layer}"])
    assert_close(clip.encode_image(images), theirs["image_embeds"])
    assert_close(clip.encode_text(tokens), theirs["text_embeds"])
    logits = clip(images, tokens)
    assert_close(logits, theirs["logits"])
    assert_close(LOSSES[clip.config.model_type](logits), theirs["loss"])


@pytest.mark.parametrize("name", STORED)
def test_vision_towers_give_the_stored_numbers_of_transformers(name):
    check_vision(FIXTURES / name, mx.load(str(FIXTURES / name / "expected.safetensors")))


@pytest.mark.parametrize("name", PAIRS)
def test_both_towers_logits_and_loss_give_the_stored_numbers_of_transformers(name):
    check_pair(FIXTURES / name, mx.load(str(FIXTURES / name / "expected.safetensors")))


@pytest.mark.parametrize("name", PAIRS)
def test_a_folder_written_equals_the_folder_read(name, tmp_path):
    clip = ContrastiveCLIP.from_pretrained(FIXTURES / name)
    clip.save_pretrained(tmp_path)
    assert_same_arrays(mx.load(str(tmp_path / "model.safetensors")), arrays_of(name))
    again = ContrastiveCLIP.from_pretrained(tmp_path)
    assert again.config == clip.config and again.processor == clip.processor
    assert np.array_equal(again.tokenize(TEXTS), clip.tokenize(TEXTS))


@pytest.mark.parametrize("name", STORED)
def test_a_vision_tower_written_equals_the_tower_read(name, tmp_path):
    tower, values = load_vision_tower(FIXTURES / name)
    save_vision_tower(tmp_path, tower, values)
    whole = {name.removeprefix("vision_model."): a for name, a in arrays_of(name).items()}
    written = mx.load(str(tmp_path / "model.safetensors"))
    assert_same_arrays(written, {name: a for name, a in whole.items() if name in written})
    left = {name for name in whole if name not in written}
    assert all(name.startswith(("text_", "pooler", "visual_projection", "logit_")) for name in left)
    assert load_vision_tower(tmp_path)[1]["hidden_size"] == 24


def test_a_vit_with_a_classifier_is_the_vit_without(tmp_path):
    shutil.copytree(FIXTURES / "vit", tmp_path, dirs_exist_ok=True)
    arrays = {f"vit.{name}": a for name, a in arrays_of("vit").items() if not name.startswith("pooler")}
    arrays["classifier.weight"] = mx.ones((5, 24))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    check_vision(tmp_path, mx.load(str(FIXTURES / "vit" / "expected.safetensors")))


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("damage", ["missing", "of another shape", "unexpected"])
def test_a_tensor_that_does_not_fit_is_one_clear_line(name, damage, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    whole = arrays_of(name)
    for key in [k for k in whole if not k.startswith("pooler")]:
        arrays = dict(whole)
        array = arrays.pop(key)
        if damage == "of another shape":
            arrays[key] = mx.zeros((*array.shape, 2))
        if damage == "unexpected":
            prefix = "vision_model." if name in PAIRS else ""
            arrays |= {key: array, f"{prefix}encoder.more": array}
        mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
        load = ContrastiveCLIP.from_pretrained if name in PAIRS else load_vision_tower
        with pytest.raises(UserError, match="holds another model than .*: .*1|3 ") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        if damage == "unexpected":
            return


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("wrong", [{"hidden_act": "silu"}, {"num_attention_heads": 5}, {"patch_size": [4, 4]}])
def test_a_setting_that_no_tower_has_is_one_clear_line(name, wrong, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    values.get("vision_config", values).update(wrong)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="an unsupported tower: .*") as caught:
        load_vision_tower(tmp_path)
    assert "\n" not in str(caught.value)
    if name in PAIRS:
        with pytest.raises(UserError, match="an unsupported tower"):
            ContrastiveCLIP.from_pretrained(tmp_path)


def test_a_folder_without_towers_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="neither a CLIP nor a SigLIP: .* 'bert'"):
        ContrastiveCLIP.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no vision tower of a known kind"):
        load_vision_tower(tmp_path)


def test_a_revision_is_the_one_asked_for(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    for revision, commit, scale in [("main", "a" * 40, 1.0), ("v1", "b" * 40, 2.0)]:
        folder = repository / "snapshots" / commit
        shutil.copytree(FIXTURES / "clip-gelu-patch8", folder)
        arrays = arrays_of("clip-gelu-patch8") | {"logit_scale": mx.array(scale)}
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    for revision, scale in [(None, 1.0), ("v1", 2.0), ("b" * 40, 2.0), ("a" * 40, 1.0)]:
        clip = ContrastiveCLIP.from_pretrained("someone/tiny", revision=revision)
        assert clip.network.logit_scale.item() == scale
    with pytest.raises(UserError, match="someone/tiny is no folder here, and not to be had"):
        ContrastiveCLIP.from_pretrained("someone/tiny", revision="v2")


@live
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", LIVE)
def test_live_networks_equal_transformers(name, seed, tmp_path):
    from tools.make_parity_fixtures import make

    make(name, tmp_path, seed)
    theirs = mx.load(str(tmp_path / "expected.safetensors"))
    check_vision(tmp_path, theirs, seed)
    if name in PAIRS:
        check_pair(tmp_path, theirs, seed)


@live
@pytest.mark.skipif(OLD_PILLOW, reason="the stored numbers are of pictures that a newer Pillow resized")
@pytest.mark.parametrize("name", STORED)
def test_live_what_is_written_gives_the_same_numbers_in_transformers(name, tmp_path):
    from tools.make_parity_fixtures import compute

    if name in PAIRS:
        ContrastiveCLIP.from_pretrained(FIXTURES / name).save_pretrained(tmp_path)
    else:
        save_vision_tower(tmp_path, *load_vision_tower(FIXTURES / name))
        shutil.copy(FIXTURES / name / "preprocessor_config.json", tmp_path)
    again, expected = compute(tmp_path), mx.load(str(FIXTURES / name / "expected.safetensors"))
    assert set(again) == set(expected)
    for key, array in again.items():
        assert np.abs(array.numpy() - np.array(expected[key])).max() < 1e-5, key


def arrays_of(name: str) -> dict[str, mx.array]:
    return mx.load(str(FIXTURES / name / "model.safetensors"))


def assert_same_arrays(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
