"""A signal at any moment of a recipe, a terminal that is gone, and an output that nobody takes."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.signal_trials import DATA

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SIGNALS = "INT TERM HUP USR1".split()
CLIP = ["recipes.train_clip", "--trainer.val-check-interval", "10", *DATA]


def trials(*flags) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.signal_trials", *flags], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


MOMENTS = ["import", "opening data", "tower", "training", "checkpoint", "captioning", "summary", "serving", "caption"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_each_signal_ends_a_recipe_with_one_line_that_says_what_was_kept_and_how_to_go_on(moment):
    done = trials("--only", moment, "--signals", *SIGNALS[:: 1 if moment in ("import", "serving", "caption") else 3])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SIGNALS)
def test_two_signals_in_a_row_are_one_wish_and_a_second_ctrl_c_ends_at_once(name):
    done = trials("--twice", "--only", "checkpoint", "summary", "--signals", name)
    assert done.returncode == 0, done.stdout


def start(tmp_path, steps, **streams):
    """A run that trains, in a session of its own."""
    command = [sys.executable, "-m", *CLIP, "--max-steps", str(steps), "--run-dir", str(tmp_path / "run")]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)


def is_whole(tmp_path) -> bool:
    return (tmp_path / "run/summary.json").exists() and (tmp_path / "run/checkpoints/last/state.json").exists()


def test_a_terminal_that_is_closed_ends_a_run_with_a_checkpoint(tmp_path):
    ours, theirs = pty.openpty()
    take_terminal = (
        "import os, fcntl, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    run = ["-m", *CLIP, "--max-steps", "100000", "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-c", take_terminal, sys.executable, *run]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
    os.close(theirs)
    while process.poll() is None and not (tmp_path / "run/checkpoints/last").exists():
        os.read(ours, 1 << 16)
    os.close(ours)  # as when its window is closed: the kernel sends SIGHUP
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert (tmp_path / "run/checkpoints/last/state.json").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_output_that_is_full_or_closed_costs_no_run(tmp_path, stream):
    with open("/dev/full", "w") as full:
        assert start(tmp_path / "full", 4, **{stream: full}).wait(timeout=120) == 0
    reader, writer = os.pipe()
    os.close(reader)  # as after `| head -1`
    process = start(tmp_path / "closed", 4, **{stream: writer})
    os.close(writer)
    assert process.wait(timeout=120) == 0
    assert is_whole(tmp_path / "full") and is_whole(tmp_path / "closed")
