"""Every part that a command names is fetched and checked before data are opened: here the data are wrong too."""

import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import constants
from small_modules import save_aligner, small_clip, tokenizer

from mlxmm.networks.language_model import Qwen3Config, build_language_model, save_language_model
from recipes.parts.named_parts import check_parts

ROOT = Path(__file__).parents[2]
MISSING = "no-one/nothing"
NAMED = [  # recipe, its flags before the part, kind of the part
    ("align_qwen3", "--module.vision", "tower"),
    ("align_qwen3", "--module.vision {tower} --module.lm", "language_model"),
    ("train_captioner", "--module.vision", "tower"),
    ("train_captioner", "--module.vision {tower} --tokenizer", "tokenizer"),
    ("train_clip", "--pretrained", "clip"),
    ("evaluate_clip", "--module", "clip"),
    ("evaluate_captions", "--module", "captioner"),
    ("evaluate_captions", "--module {captioner} --clip", "clip"),
    ("caption", "--module", "captioner"),
    ("zero_shot", "--classes a,b --module", "clip"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A good folder of each kind."""
    root = tmp_path_factory.mktemp("parts")
    small_clip().save_pretrained(root / "clip")
    config = Qwen3Config(hidden_size=32, num_hidden_layers=2, intermediate_size=64).to_hub(tokenizer(False))
    (root / "language_model").mkdir()
    save_language_model(root / "language_model", build_language_model(config), config)
    tokenizer(False).save_pretrained(str(root / "language_model"))
    save_aligner(root / "captioner")
    kinds = {"tower": "clip", "tokenizer": "language_model"}
    return {kind: root / kinds.get(kind, kind) for _, _, kind in NAMED}


@pytest.fixture
def run(parts, tmp_path, capsys, monkeypatch):
    """Run a recipe on data that are wrong as well: its exit code and its errors."""
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "cache"))

    def run(recipe, flags, part):
        (tmp_path / "picture.png").write_text("no picture")
        data = ["--data.source", "nowhere.parquet", "--run-dir", tmp_path / "run"]
        data = [tmp_path / "picture.png"] if recipe in ("caption", "zero_shot") else data
        argv = [recipe, *flags.format(**parts).split(), part, *data]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        monkeypatch.delitem(sys.modules, f"recipes.{recipe}", raising=False)  # to be run as the main module
        with pytest.raises(SystemExit) as exit:
            runpy.run_module(f"recipes.{recipe}", run_name="__main__")
        return exit.value.code, capsys.readouterr().err.splitlines()

    return run


def refused(result, message: str, folder: Path) -> None:
    code, lines = result
    assert code == 2 and lines[-1].startswith("error: ") and message in lines[-1], lines
    assert not (folder / "run").exists() and not (folder / "cache").exists()


@pytest.mark.parametrize(("recipe", "flags", "kind"), NAMED)
def test_a_part_that_is_not_to_be_had_is_named_before_data_are_opened(run, recipe, flags, kind, tmp_path):
    refused(run(recipe, flags, MISSING), f"{MISSING} is no folder here, and not to be had from the Hub", tmp_path)


def rewrite(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split_weights(folder: Path) -> None:
    """Two shards and their index; the second is missing."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def cut_weights(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])


def to_torch(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shutil.copy(ROOT / "tests/fixtures/torch/zip.bin", folder / "pytorch_model.bin")


WITH_MODEL_FILE, LOADED = {"tower", "clip", "language_model"}, {"tower", "clip", "language_model", "captioner"}
DAMAGE = {  # what is done to a folder, the kinds of parts that it spoils, and the line
    "config gone": (lambda to: (to / "config.json").unlink(), LOADED, "holds no model: it has no config.json"),
    "config cut": (lambda to: (to / "config.json").write_text("{"), LOADED, "it is damaged"),
    "kind": (lambda to: rewrite(to / "config.json", model_type="nope", vision_config={}), LOADED, "nope"),
    "weights gone": (
        lambda to: (to / "model.safetensors").unlink(),
        WITH_MODEL_FILE,
        "has neither model.safetensors nor pytorch_model.bin",
    ),
    "weights of ours gone": (
        lambda to: (to / "weights.safetensors").unlink(),
        {"captioner"},
        "weights.safetensors is missing or damaged",
    ),
    "weights cut": (cut_weights, LOADED, "is missing or damaged"),
    "shard gone": (split_weights, WITH_MODEL_FILE, "lacks model-00002-of-00002.safetensors, which model.safetensors"),
    "PyTorch's alone": (to_torch, {"language_model"}, "it has pytorch_model.bin, and no model.safetensors"),
    "preprocessing gone": (
        lambda to: (to / "preprocessor_config.json").unlink(),
        {"tower", "clip", "captioner"},
        "has no preprocessor_config.json",
    ),
    "tokenizer gone": (
        lambda to: (to / "tokenizer.json").unlink(),
        {"language_model", "tokenizer", "clip", "captioner"},
        "holds no tokenizer: tokenizer.json is missing",
    ),
    "no end token": (
        lambda to: rewrite(to / "tokenizer_config.json", eos_token=None),
        {"language_model", "tokenizer"},
        "has no end token",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_cannot_be_loaded_is_named_before_data_are_opened(run, parts, damage, tmp_path):
    change, kinds, message = DAMAGE[damage]
    first_of_each = {kind: (recipe, flags) for recipe, flags, kind in reversed(NAMED)}
    for kind in sorted(kinds):
        folder = tmp_path / kind
        shutil.copytree(parts[kind], folder)
        change(folder)
        result = run(*first_of_each[kind], folder)
        refused(result, message, tmp_path)
        assert str(folder) in result[1][-1]


@pytest.mark.parametrize(("recipe", "flags", "kind"), NAMED)
def test_a_good_part_is_taken_and_the_data_are_named_then(run, parts, recipe, flags, kind, tmp_path):
    message = "not a picture" if recipe == "zero_shot" else "nowhere.parquet is not there"
    if recipe != "caption":  # which goes on with the next picture
        refused(run(recipe, flags, parts[kind]), message, tmp_path)


@pytest.mark.parametrize(("recipe", "flags", "kind"), NAMED)
def test_a_part_is_taken_from_the_hub_at_the_revision_in_its_id(run, parts, recipe, flags, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, revision = tmp_path / "hub" / "models--some--part", "refs/pr/1"
    shutil.copytree(parts[kind], repository / "snapshots" / ("a" * 40))
    (repository / "refs/refs/pr").mkdir(parents=True)
    (repository / "refs" / revision).write_text("a" * 40)
    if recipe != "caption":
        message = "not a picture" if recipe == "zero_shot" else "nowhere.parquet is not there"
        refused(run(recipe, flags, f"some/part@{revision}"), message, tmp_path)
    refused(run(recipe, flags, "some/part@v1"), "some/part@v1 is no folder here, and not to be had", tmp_path)


def test_pytorchs_weights_are_enough_for_a_tower(run, parts, tmp_path):
    shutil.copytree(parts["tower"], tmp_path / "tower")
    to_torch(tmp_path / "tower")
    refused(run("align_qwen3", "--module.vision", tmp_path / "tower"), "nowhere.parquet is not there", tmp_path)


class NoModels(http.server.BaseHTTPRequestHandler):
    """A Hub that has no models, and says so."""

    def do_GET(self):
        self.server.paths.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoModels)
    server.paths = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_preset_whose_tower_the_hub_does_not_have_ends_before_its_data_are_asked_for(hub, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"MLXMM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "recipes.align_qwen3", "--preset", "flickr30k", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(
        "error: openai/clip-vit-base-patch32 is no folder here, and not to be"
    )
    assert any("models/openai/clip-vit-base-patch32" in path for path in hub.paths)
    assert not [path for path in hub.paths if "flickr30k" in path] and not (tmp_path / "run").exists()


def test_weights_are_not_read_by_the_check(parts):
    before = mx.get_active_memory()
    check_parts(tower=parts["tower"], language_model=parts["language_model"], captioner=parts["captioner"])
    assert mx.get_active_memory() == before


@pytest.mark.parametrize(
    ("recipe", "named"), [("look_at_data", ["some/set"]), ("caption", ["--module", "some/model", "docs/images"])]
)
def test_without_a_network_what_is_not_in_the_cache_is_one_line_at_once(recipe, named, tmp_path):
    home = {"HF_ENDPOINT": "http://no-such-host.invalid", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | home
    environment |= {"PYTHONPATH": str(ROOT)}
    shutil.copytree(ROOT / "docs/images", tmp_path / "docs/images")
    command = [sys.executable, "-m", f"recipes.{recipe}", *named]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no network: no-such-host.invalid is not found" in done.stdout
    assert done.stderr.startswith("error: some/") and re.search("is neither|is no folder", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert "again" not in done.stdout  # its clients would try for more than a minute
