"""Recipes on several sources: killed and resumed they end as if never stopped; what is wrong is one line."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_sources import three_splits, write_source

from mlxmm.cli import parse_config
from mlxmm.errors import UserError
from mlxmm.training.logger import repeatable
from recipes import train_clip

ROOT = Path(__file__).parents[2]


def command(*flags):
    return [sys.executable, "-m", "recipes.train_clip", *map(str, flags)]


def run(*flags):
    return subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True, timeout=240)


def run_here(*flags):
    train_clip.main(parse_config("train_clip", train_clip.PRESETS, [*map(str, flags), "--trainer.no-compile"]))


@pytest.fixture
def flags(tmp_path):
    first = write_source(tmp_path / "a.parquet", range(56), "a red circle", split=three_splits(48, 4))
    second = write_source(tmp_path / "b.parquet", range(100, 132), "a blue square", score=[i / 32 for i in range(32)])
    named = [
        "--data.source",
        first,
        second,
        "shapes",
        "--data.weights",
        "1",
        "0.5",
        "2",
        "--data.split-column",
        "split",
    ]
    return [
        "--preset",
        "tiny",
        *named,
        "--data.where",
        "score>=0.25",
        "--data.shapes.num-train",
        16,
        "--trainer.log-every-n-steps",
        1,
    ]


def ending(folder: Path) -> dict:
    """Checksums of the weights, and all metrics but those of time and memory."""
    files = ["checkpoints/last/weights.safetensors", "model/model.safetensors"]
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = [{name: value for name, value in repeatable(row).items() if name != "time"} for row in rows]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files} | {"metrics": metrics}


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_as_one_never_stopped(flags, tmp_path):
    flags = [*flags, "--max-steps", 60]
    assert run(*flags, "--run-dir", tmp_path / "whole").returncode == 0
    folder = tmp_path / "killed"
    child = subprocess.Popen(command(*flags, "--run-dir", folder), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (folder / "checkpoints" / "last").exists() and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    assert child.wait() < 0, "it ended before it was killed"
    done = run("--run-dir", folder, "--resume", "last")
    assert done.returncode == 0, done.stderr
    assert ending(folder) == ending(tmp_path / "whole")


def test_a_run_names_its_data_and_is_not_resumed_on_others(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    run_here(*flags, "--max-steps", 2, "--run-dir", folder)
    assert "score>=0.25 leaves out 8 of 32 train rows" in capsys.readouterr().out
    sources = json.loads((folder / "data.json").read_text())
    assert [(one["rows"]["train"], one["weight"]) for one in sources] == [(48, 1), (24, 0.5), (16, 2)]
    assert json.loads((folder / "config.json").read_text())["data"]["where"] == ["score>=0.25"]
    exported = json.loads((folder / "model" / "data.json").read_text())
    assert [one["source"] for one in exported] == ["a.parquet", "b.parquet", "shapes"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = r"b\.parquet gave 24 training rows, and gives 16\. Bring them back, or start a new run"
    with pytest.raises(UserError, match=line):
        run_here("--run-dir", folder, "--resume", "last", "--data.where", "score>=0.5", "--max-steps", 4)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_weight_that_gives_no_row_leaves_no_run(flags, tmp_path):
    flags[flags.index("--data.weights") + 2] = "0.001"
    with pytest.raises(UserError, match="gives none of its 24 training rows"):
        run_here(*flags, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
