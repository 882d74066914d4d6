"""Recipes on a disk that takes no file longer than so many bytes: each goes on without what it cannot write, or ends in
one line; what was there before stays, and the run goes on once there is room."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DATA = "--data.shapes.num-train 96 --data.shapes.num-val 32 --data.shapes.num-test 16".split()
TRAIN = [*"--preset tiny --max-steps 8 --trainer.val-check-interval 4 --checkpoint-every 4".split(), *DATA]
RECIPES = {
    "align_qwen3": [*TRAIN, "--cached-features", "--unfreeze-step", "4"],
    "train_clip": [*"--trainer.max-steps 8 --trainer.val-check-interval 4 --data.batch-size 16".split(), *DATA],
    "write_captions": ["--captioner.model", "shapes", "--captioner.batch-size", "4", *DATA],
    "look_at_data": DATA,
}
SIZES = [10, 600, 8_000, 60_000, 400_000]  # bytes


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Where each recipe has run once: the kernels are compiled then, as the compiler needs a disk too."""
    folder = tmp_path_factory.mktemp("disk")
    for recipe in RECIPES:
        assert run(folder / recipe, recipe, None).returncode == 0
    return folder


def run(folder: Path, recipe: str, size: int | None, *flags) -> subprocess.CompletedProcess:
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    environment = os.environ | {"MLXMM_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", f"recipes.{recipe}", *(flags or RECIPES[recipe]), "--run-dir", str(folder / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, cwd=ROOT, env=environment, preexec_fn=limit, timeout=300, **pipes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_on_a_full_disk_ends_in_one_line_and_goes_on_with_room(tmp_path, recipe, size):
    done = run(tmp_path, recipe, size)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert (done.returncode, len(errors)) in [(0, 0), (2, 1)], done.stderr
    if errors:
        assert any(
            told in errors[0] for told in ("cannot be written", "File too large", "Unable to write", "disk I/O error")
        ), errors
    for path in (tmp_path / "run").rglob("*.json"):
        json.loads(path.read_text())
    if (tmp_path / "run").exists() and recipe != "look_at_data":
        again = run(tmp_path, recipe, None, "--resume", "last")
        assert again.returncode == 0 and not list(tmp_path.rglob(".tmp-*")), again.stderr
