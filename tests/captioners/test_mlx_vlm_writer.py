"""Captions by mlx-vlm: those of a batch are those of single images, and a child that is killed costs none."""

import importlib.util
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_qwen_vl import save_tiny_qwen_vl

from mlxmm.captioners import mlx_vlm_writer
from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.mlx_vlm_writer import MlxVlmConfig, MlxVlmWriter
from mlxmm.errors import UserError

HAS_MLX_VLM = importlib.util.find_spec("mlx_vlm") is not None
needs_mlx_vlm = pytest.mark.skipif(not HAS_MLX_VLM, reason="mlx-vlm is not installed")
GREEDY = Sampling(max_tokens=12)
PROMPTS = ("What is this?", "Describe this picture in one sentence.")
ROOT = Path(__file__).parents[2]
# The child as it is, but that it aborts if a batch has more than four images.
SMALL_MEMORY = f"""if True:
    import os, sys
    sys.path.insert(0, {str(ROOT)!r})
    from mlxmm.captioners import mlx_vlm_child
    write = mlx_vlm_child.write_captions
    mlx_vlm_child.write_captions = lambda *args: os.abort() if len(args[1]) > 4 else write(*args)
    mlx_vlm_child.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_qwen_vl(tmp_path_factory.mktemp("tiny-qwen-vl"))


@pytest.fixture
def make_writer(model):
    writers = []

    def make(**settings) -> MlxVlmWriter:
        writers.append(MlxVlmWriter(MlxVlmConfig(**{"model": str(model)} | settings)))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()


def pictures(num: int) -> tuple[list[Image.Image], list[str]]:
    """Of three sizes, with two prompts."""
    rng, sizes = np.random.default_rng(0), ((56, 56), (84, 56), (56, 112))
    images = []
    for i in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        images.append(coarse.resize(sizes[i % 3]))
    return images, [PROMPTS[i // 3 % 2] for i in range(num)]


@needs_mlx_vlm
def test_greedy_captions_of_batches_are_those_of_single_images(make_writer):
    images, prompts = pictures(64)
    batched = make_writer(batch_size=16).write(images, prompts, GREEDY)
    assert batched == make_writer(batch_size=1).write(images, prompts, GREEDY)
    assert len({caption.text for caption in batched}) > 16
    assert {caption.finish_reason for caption in batched} == {"stop", "length"}
    assert all((c.num_tokens == 12) == (c.finish_reason == "length") for c in batched)
    assert [(c.width, c.height) for c in batched] == [image.size for image in images]


@needs_mlx_vlm
def test_a_child_without_memory_for_the_batch_or_killed_in_its_middle_costs_no_caption(make_writer):
    images, prompts = pictures(24)
    expected = make_writer().write(images, prompts, GREEDY)
    writer = make_writer(batch_size=16)
    writer.child.close()
    writer.child.command[writer.child.command.index("-c") + 1 :] = [SMALL_MEMORY, writer.child.command[-1]]
    assert writer.write(images, prompts, GREEDY) == expected and writer.batch_size == 4
    writer = make_writer(batch_size=24)
    long = Sampling(max_tokens=400)
    unharmed = writer.write(images, prompts, long)
    threading.Timer(0.1, os.kill, [first := writer.child.pid, signal.SIGABRT]).start()
    assert writer.write(images, prompts, long) == unharmed and writer.child.pid != first


@needs_mlx_vlm
def test_sampled_captions_are_a_function_of_the_batch_and_the_seed(make_writer):
    images, prompts = pictures(6)
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, seed=3)
    writer = make_writer()
    first = writer.write(images, prompts, sampling)
    writer.write(images[:2], prompts[:2], sampling)
    assert writer.write(images, prompts, sampling) == first
    assert writer.write(images, prompts, Sampling(temperature=1.0, top_p=0.9, max_tokens=12, seed=4)) != first


@needs_mlx_vlm
def test_images_are_made_smaller_and_one_that_the_model_refuses_fails_alone(make_writer):
    writer = make_writer(max_pixels=3200)
    images = [Image.new("RGB", (400, 200), "red"), Image.new("RGB", (6000, 2), "blue"), Image.new("L", (40, 80))]
    large, strip, grey = writer.write(images, ["What is this?"] * 3, GREEDY)
    assert (large.width, large.height, grey.width, grey.height) == (80, 40, 40, 80)
    assert "aspect ratio must be smaller than 200" in strip.reason


@needs_mlx_vlm
def test_the_revision_is_the_checksum_of_the_folder_and_the_quantization_is_known(model, make_writer, tmp_path):
    writer = make_writer()
    assert (writer.name, writer.quantization, len(writer.revision)) == (model.name, "", 16)
    copy = save_tiny_qwen_vl(tmp_path)
    quantize(copy)
    quantized = make_writer(model=str(copy))
    assert quantized.quantization == "4 bits, groups of 64" and quantized.revision != writer.revision
    assert quantized.write(*pictures(2), GREEDY) != writer.write(*pictures(2), GREEDY)


def quantize(folder: Path) -> None:
    """As the converted models of the Hub: linear layers of the language model in 4 bits."""
    import mlx.core as mx

    weights = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        if name.startswith("language_model.") and name.endswith("proj.weight"):
            parts = mx.quantize(array, group_size=64, bits=4)
            weights |= {name.replace("weight", part): a for part, a in zip(("weight", "scales", "biases"), parts)}
        else:
            weights[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))


@needs_mlx_vlm
def test_a_folder_that_cannot_be_read_is_one_line(model, tmp_path):
    cases = {
        "is not there: neither a folder nor a Hub id": lambda folder: "no-such-folder",
        "reads no images: its config.json has no vision_config": lambda folder: edit(folder, vision_config=None),
        "cannot be loaded by mlx-vlm: ValueError: Model type nosuch not supported": lambda folder: edit(
            folder, model_type="nosuch"
        ),
        "has neither model.safetensors nor": lambda folder: (folder / "model.safetensors").unlink(),
    }
    for number, (message, spoil) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        name = spoil(folder) or str(folder)
        with pytest.raises(UserError) as error:
            MlxVlmWriter(MlxVlmConfig(model=name))
        assert message in str(error.value) and "\n" not in str(error.value)


@needs_mlx_vlm
def test_code_from_the_hub_is_not_run(model, monkeypatch):
    monkeypatch.setattr(mlx_vlm_writer, "local_folder", lambda name: model)
    monkeypatch.setattr(mlx_vlm_writer, "read_config", lambda folder: {"vision_config": {}, "model_file": "x.py"})
    with pytest.raises(UserError, match="user/name brings code"):
        MlxVlmWriter(MlxVlmConfig(model="user/name"))


def edit(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_without_mlx_vlm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    with pytest.raises(UserError, match=r"pip install 'mlxmm\[vlm\]'"):
        MlxVlmWriter(MlxVlmConfig(model="none"))
