"""What a user loads by Hub ids: layouts of real repositories, narrow and with random weights, from a local Hub."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import attrs
import mlx.core as mx
import pytest
from load_from_hub import LANGUAGE_MODELS, TOWERS, same, tower
from local_hub import LocalHub
from mlx.utils import tree_flatten

from mlxmm import Qwen3Aligner
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.networks.language_model import build_language_model
from mlxmm.networks.pretrained_vision import build_vision_tower, from_hub, vision_values
from mlxmm.storage.atomic import read_arrays
from recipes.parts.alignment import FLICKR30K_PRESETS, plan_alignment
from tools import layout_flickr30k
from tools.layout_weights import write_safetensors
from tools.make_real_layouts import MODELS, NAMES, make

ROOT = Path(__file__).parents[2]
CLIP, LAION = "openai/clip-vit-base-patch32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
QWEN = "Qwen/Qwen3-0.6B-Base"
PARAMETERS = {  # as published, in the file that is read
    CLIP: 151_277_313,
    LAION: 151_277_313,
    "google/siglip-base-patch16-224": 203_155_970,
    "google/siglip2-base-patch16-224": 375_187_970,
    "google/vit-base-patch16-224-in21k": 86_389_248,
    QWEN: 596_049_920,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}
ROWS = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All repositories; a pull request turns CLIP's weights into safetensors, with other numbers."""
    folder = tmp_path_factory.mktemp("repositories")
    make(folder, NAMES, tiny=True, rows=ROWS)
    pull_request, model = folder / f"{CLIP}@refs/pr/1", MODELS[CLIP](True)
    model.write(pull_request, seed=1)
    (pull_request / "pytorch_model.bin").unlink()
    write_safetensors(pull_request / "model.safetensors", model.weights["pytorch_model.bin"], seed=1)
    return folder


@pytest.fixture(scope="module")
def hub(root):
    with LocalHub(root) as local_hub:
        yield local_hub


def child(hub: LocalHub, home: Path, *arguments) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, with an empty cache: the clients read their settings when imported."""
    environment = hub.environment(home) | {"PYTHONPATH": str(ROOT), "MLXMM_CACHE": str(home / "mlxmm")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def loaded(hub, root, tmp_path_factory):
    done = child(hub, tmp_path_factory.mktemp("home"), Path(__file__).with_name("load_from_hub.py"), root)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOWERS, *LANGUAGE_MODELS])
def test_a_hub_id_gives_the_numbers_that_its_folder_gives(loaded, name):
    assert loaded["same"][name]


def test_a_revision_has_weights_of_its_own(root):
    assert not same(tower(root / CLIP), tower(root / f"{CLIP}@refs/pr/1"))


@pytest.mark.slow
def test_only_the_weights_that_are_read_are_fetched(loaded):
    weights = {
        name: tuple(file for file in files if file.endswith((".bin", ".safetensors")))
        for name, files in loaded["files"].items()
    }
    assert weights.pop(CLIP) == ("pytorch_model.bin",)
    assert set(weights.values()) == {("model.safetensors",)}


@pytest.mark.slow
def test_the_splits_of_flickr30k_are_those_of_its_column(loaded):
    assert loaded["rows"] == layout_flickr30k.split_counts(ROWS) == {"train": 52, "val": 4, "test": 4}
    assert set(loaded["captions"].values()) == {5}


def test_lineage_has_the_commit_that_data_were_read_at(loaded, hub):
    assert loaded["commits"] == [hub.commit("datasets", "nlphuji/flickr30k", "refs/convert/parquet")]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("main", "nlphuji/flickr30k cannot be read: .*scripts are no longer supported.*flickr30k.py"),
        ("openai/nothing", "is no folder here, and not to be had from the Hub: 404 .*Repository Not Found"),
        (f"{CLIP}@refs/pr/2", "is no folder here, and not to be had from the Hub: 404 .*Revision Not Found"),
    ],
)
def test_what_is_not_there_is_one_line(loaded, name, line):
    assert re.search(line, loaded["refused"][name]) and "\n" not in loaded["refused"][name]


def test_a_bin_is_the_same_network_as_safetensors(root, tmp_path):
    model = MODELS[CLIP](True)
    model.write(tmp_path, seed=0)
    (tmp_path / "pytorch_model.bin").unlink()
    write_safetensors(tmp_path / "model.safetensors", model.weights["pytorch_model.bin"], seed=0)
    assert same(tower(tmp_path), tower(root / CLIP))


@pytest.mark.parametrize(
    ("name", "end"), [(CLIP, 49_407), (LAION, 49_407), ("google/siglip2-base-patch16-224", 1)], ids=str
)
def test_a_model_of_two_towers_reads_pictures_and_texts(root, name, end):
    clip = ContrastiveCLIP.from_pretrained(root / name)
    tokens = clip.tokenize(["a young man", "two women are talking " * 30])
    assert tokens.shape == (2, clip.config.text.max_position_embeddings) and tokens[1, -1] == end
    assert clip(mx.zeros((1, 224, 224, 3)), tokens).shape == (1, 2)


@pytest.mark.parametrize("name", [name.partition("@")[0] for name in TOWERS if "@" not in name])
def test_at_real_size_a_tower_finds_every_array_it_expects(name):
    model = MODELS[name](False)
    values = vision_values(model.config, Path(name))
    arrays = next(iter(model.weights.values()))
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in arrays) else ""
    zeros = {key.removeprefix(prefix): mx.zeros(a.shape) for key, a in arrays.items() if key.startswith(prefix)}
    expected = {key: array.shape for key, array in tree_flatten(build_vision_tower(values).parameters())}
    assert {key: array.shape for key, array in from_hub(zeros, values).items()} == expected


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_at_real_size_a_language_model_finds_every_array_it_expects(name):
    model = MODELS[name](False)
    expected = {key: array.shape for key, array in tree_flatten(build_language_model(model.config).parameters())}
    assert {key: array.shape for key, array in model.weights["model.safetensors"].items()} == expected


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_numbers_of_parameters_are_those_published(name):
    arrays = next(iter(MODELS[name](False).weights.values())).values()
    assert sum(math.prod(array.shape) for array in arrays if array.dtype != "I64") == PARAMETERS[name]


FIRST_AND_SLOW = [
    pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(FLICKR30K_PRESETS)
]


@pytest.mark.parametrize("acts_as", ["cpu", "gpu"])
@pytest.mark.parametrize("name", FIRST_AND_SLOW)
def test_a_preset_is_planned_from_settings_as_it_is_from_weights(root, name, acts_as, monkeypatch):
    monkeypatch.setenv("MLXMM_ACT_AS", acts_as)
    config = FLICKR30K_PRESETS[name].config
    module = attrs.evolve(config.module, vision=str(root / CLIP), lm=str(root / QWEN))
    plans = [plan_alignment(config, make(module), 9) for make in (Qwen3Aligner.unloaded, Qwen3Aligner.from_parts)]
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_the_doctor_plans_every_preset_and_fetches_no_weights(hub, tmp_path):
    report = child(hub, tmp_path, "-m", "recipes.doctor").stdout
    for name in FLICKR30K_PRESETS:
        assert re.search(
            rf"^  {name} +needs about .* GiB of memory .* GiB of disk: (this machine|there are)", report, re.M
        )
    files = {path.suffix for path in (tmp_path / "hub").rglob("*")}
    assert ".json" in files and not files & {".safetensors", ".bin"}
    assert "needs about" in child(hub, tmp_path, "-m", "recipes.doctor", "--offline").stdout  # from the cache


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """A run of the preset, from Hub ids to the exported captioner."""
    folder, home = tmp_path_factory.mktemp("runs") / "one", tmp_path_factory.mktemp("home")
    flags = "--preset flickr30k --max-steps 2 --unfreeze-step 1 --max-test 2 --module.projector-width 32".split()
    child(hub, home, "-m", "recipes.align_qwen3", *flags, "--run-dir", folder)
    Qwen3Aligner.from_pretrained(folder / "checkpoints" / "last").save_pretrained(folder / "export")
    return folder


@pytest.mark.slow
def test_the_preset_runs_from_hub_ids_to_its_summary(run):
    summary, config = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "config"))
    assert config["module"]["vision"] == CLIP and config["module"]["lm"] == QWEN
    assert summary["data/skipped"] == 0 and "test/bleu" in summary
    assert summary["val/loss"] == pytest.approx(math.log(151_936), abs=0.2)  # random weights: all tokens alike


@pytest.mark.slow
def test_the_run_can_be_exported(run):
    arrays = read_arrays(run / "export" / "model.safetensors")
    assert arrays["language_model.model.embed_tokens.weight"].shape[1] == 32
    assert {path.name for path in (run / "export").iterdir()} >= {"config.json", "tokenizer.json", "README.md"}
