"""A dozen trials of tools/damage.py: each damaged file is named in one line or made again, and never used unnoticed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.damage import Trial, outcome

ROOT = Path(__file__).parents[1]
TRIALS = [
    ("resume", "run/config.json", "missing"),
    ("resume", "run/config.json", "value"),
    ("resume", "run/metrics.jsonl", "cut"),
    ("resume", "run/checkpoints/step=8/state.json", "value"),
    ("resume", "run/checkpoints/step=8/optimizer.safetensors", "flipped"),
    ("caption", "run/checkpoints/step=8/weights.safetensors", "flipped"),
    ("caption", "run/checkpoints/step=8/tokenizer_config.json", "retyped"),
    ("serve", "run/config.json", "cut"),
    ("evaluate", "run/checkpoints/step=8/preprocessor_config.json", "value"),
    ("again", "cache/tower-*/model.safetensors", "flipped"),
    ("again", "cache/language-model-*/tokenizer.json", "emptied"),
    ("again", "cache/features/*/blocks.jsonl", "retyped"),
]


@pytest.mark.slow
def test_damaged_files_are_named_or_made_again(tmp_path):
    chosen = [word for trial in TRIALS for word in ("--trial", ",".join(trial))]
    done = subprocess.run([sys.executable, "-m", "tools.damage", *chosen], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(TRIALS)} of {len(TRIALS)} right" in done.stdout


@pytest.mark.parametrize(
    ("file", "code", "last", "is_same", "is_restored", "expected"),
    [
        ("run/config.json", 2, "error: run/config.json is damaged", False, False, "named"),
        ("run/config.json", 2, "error: seed is no number", False, False, "UNNAMED"),
        ("run/config.json", 1, "ValueError: run/config.json", False, False, "TRACEBACK"),
        ("run/config.json", 0, "", False, False, "SILENT"),
        ("run/metrics.jsonl", 0, "", True, False, "harmless"),
        ("cache/tower/model.safetensors", 0, "", True, False, "SILENT"),
        ("cache/tower/model.safetensors", 0, "", True, True, "repaired"),
        ("cache/features/1/features.bin", -7, "", False, False, "CRASH 7"),
    ],
)
def test_the_damage_tool_takes_nothing_damaged_for_right(file, code, last, is_same, is_restored, expected):
    assert outcome(Trial("again", file, "cut"), code, last, last, is_same, is_restored) == expected
