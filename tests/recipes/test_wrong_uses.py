"""Ways to hold the recipes wrong: each ends in one line that says what to put right, with exit code 2.

python -m pytest -m slow -s tests/recipes/test_wrong_uses.py        prints them as a table
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_sources import pictures, three_splits, write_source

ROOT = Path(__file__).parents[2]
# In a folder that holds data.parquet, notes.parquet (no picture), pictures/ (no captions), empty/, a file and a run.
WRONG = [
    ("align_qwen3 --learning-rate 1e-3", "did you mean --lr?"),
    ("align_qwen3 --precision 16-mixed", "did you mean --trainer.precision"),
    ("align_qwen3 --preset tinny", "--preset tinny: choose one of default, tiny"),
    ("align_qwen3 --batch-size 0", "error: data: 'batch_size' must be >= 1: 0"),
    ("align_qwen3 --batch-size many", "--data.batch-size: a whole number is wanted, not 'many'\n"),
    ("align_qwen3 --max-steps ten", "a whole number is wanted, not 'ten'\n"),
    ("align_qwen3 --max-steps", "--trainer.max-steps"),
    ("align_qwen3 --trainer.strategy fsdp2", "'strategy' must be in ('auto', 'ddp', 'fsdp')"),
    ("align_qwen3 --trainer.max-time soon", "'max_time' must be like 00:12:00:00"),
    ("align_qwen3 --logger tensorbord", "choose of tensorboard, wandb, trackio"),
    ("align_qwen3 --unfreeze-layers 99", "--unfreeze-layers 99: the language model has 4 layers"),
    ("align_qwen3 --module.layer 99", "layer 99 of a tower with hidden states 0 to"),
    ("align_qwen3 --module.projector resampler", "'projector' must be in ('linear', 'mlp', 'pixel_shuffle')"),
    ("align_qwen3 --module.vision nowhere", "nowhere is not there: neither a folder nor a Hub id"),
    ("align_qwen3 --module.vision ./pictures", "pictures holds no model: it has no config.json"),
    ("align_qwen3 --module.lm user/absent", "user/absent is no folder here, and not to be had from the Hub"),
    ("align_qwen3 --tower.hidden-size 64 --module.vision pictures", "Unrecognized options: --tower.hidden-size"),
    ("align_qwen3 --data.source nowhere.parquet", "nowhere.parquet is not there"),
    ("align_qwen3 --data.source '~/absent'", "absent is not there"),
    ("align_qwen3 --data.source user/absent", "user/absent"),
    ("align_qwen3 --data.source empty", "empty"),
    ("align_qwen3 --data.source notes.parquet", "notes.parquet"),
    ("align_qwen3 --data.source data.parquet --data.caption-column text", "text"),
    ("align_qwen3 --data.source data.parquet --data.image-column caption", "caption"),
    ("align_qwen3 --data.source data.parquet --data.split-column caption", "must say train, val or test"),
    ("align_qwen3 --resume last", "there is no run in runs/align_qwen3"),
    ("align_qwen3 --resume nowhere", "no checkpoint is there"),
    ("align_qwen3 --run-dir run", "run exists: name another --run-dir, or add --resume last"),
    ("align_qwen3 --run-dir file", "file"),
    ("align_qwen3 --run-dir file/run", "file"),
    ("align_qwen3 --push-to mine", "it needs a user, user/name"),
    ("align_qwen3 --preset tiny --push-to me/mine", "without a token: hf auth login, or set HF_TOKEN"),
    ("train_clip --data.source pictures", "pictures"),
    ("train_clip --pretrained pictures", "pictures holds no model: it has no config.json"),
    ("train_captioner --tokenizer nowhere", "nowhere is not there"),
    ("caption", "--module is missing"),
    ("caption --module run", "no pictures: name files, or folders"),
    ("caption --module run absent.jpg", "absent.jpg is not there"),
    ("caption --module run pictures", "run"),
    ("caption --module run pictures --to captions.txt", "must end in .csv or .jsonl"),
    ("zero_shot --module nowhere --classes cat dog --images pictures", "Unrecognized options"),
    ("zero_shot --module nowhere --classes cat dog -- pictures/0.png", "nowhere is not there"),
    ("serve nowhere", "nowhere is not there"),
    ("serve run --port 99999999", "error: 'port' must be <= 65535: 99999999"),
    ("look_at_data nowhere", "nowhere is not there: neither a file, a glob, a folder nor a Hub id"),
    ("look_at_data notes.parquet", "notes.parquet"),
    ("write_captions --captioner.model nowhere --data.source pictures", "nowhere is not there"),
    (
        "write_captions --captioner.model m --captioner.url ftp://x --data.source pictures",
        "is not the address of a server",
    ),
    ("merge_captions nowhere", "nowhere is not there"),
    ("evaluate_captions --module nowhere", "nowhere is not there"),
    ("evaluate_clip --module nowhere", "nowhere is not there"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    write_source(folder / "data.parquet", range(12), split=three_splits(8))
    pictures(folder / "pictures")
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    (folder / "file").touch()
    (folder / "notes.parquet").write_bytes(b"notes")
    return folder


def hold_wrong(command: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"MLXMM_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_TOKEN", None)
    recipe, *flags = shlex.split(command)
    words = [sys.executable, "-m", f"recipes.{recipe}", *flags]
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "message"), WRONG, ids=[command for command, _ in WRONG])
def test_each_ends_in_one_line_with_exit_code_2(command, message, folder):
    done = hold_wrong(command, folder)
    last = done.stderr.strip().splitlines()[-1:]
    print(f"\n| `{command}` | {done.returncode} | {' '.join(last)} |")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(last) == 1 == done.stderr.count("\n")
    assert message in done.stderr
