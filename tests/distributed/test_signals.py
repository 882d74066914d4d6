"""Signals that end a run: which are heard, when, and what they leave whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback
from mlxmm.callbacks import ModelCheckpoint
from mlxmm.distributed.signals import ENDS, Ended, Interrupted, check_end, end_requests, raised
from mlxmm.storage import checkpoint

ROOT = Path(__file__).parents[2]


class Validated(TinyRegression):
    """A module whose validation can be counted."""

    def validation_step(self, batch):
        return self.training_step(batch)


class EndInValidation(Callback):
    """Sends a signal in the middle of the validation after an update."""

    def __init__(self, step: int, number: int):
        self.step, self.number, self.num_batches = step, number, 0

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        self.num_batches += 1
        if trainer.global_step == self.step and batch_idx == 1:
            os.kill(os.getpid(), self.number)


def fit(make_trainer, *callbacks, **options):
    trainer = make_trainer(max_steps=8, val_check_interval=2, num_sanity_val_steps=0, callbacks=list(callbacks))
    trainer.fit(Validated(), DistinctBatches(), DistinctBatches(4), **options)
    return trainer


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_in_validation_is_heard_at_the_next_batch_and_the_resumed_run_is_the_whole_one(
    make_trainer, tmp_path, number
):
    whole = fit(make_trainer, ModelCheckpoint(monitor="val/loss", dirpath=tmp_path / "whole"))
    end, save = EndInValidation(4, number), ModelCheckpoint(monitor="val/loss")
    with pytest.raises(Interrupted) as caught:
        fit(make_trainer, end, save)
    assert caught.value.code == 128 + number and end.num_batches == 4 + 2
    last = tmp_path / "checkpoints/last"
    assert checkpoint.read_state(last)["global_step"] == 4 and checkpoint.read_state(last)["validating"]
    resumed = fit(make_trainer, again := ModelCheckpoint(monitor="val/loss"), ckpt_path="last")
    assert resumed.callback_metrics == whole.callback_metrics
    assert again.scores == whole.checkpoint_callback.scores
    names = {(tmp_path / folder / "best").resolve().name for folder in ("whole", "checkpoints")}
    assert len(names) == 1


def test_what_is_ignored_stays_ignored_and_others_are_restored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with end_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.number is None
            os.kill(os.getpid(), signal.SIGUSR1)
            assert request.number == signal.SIGUSR1
            with pytest.raises(Interrupted):
                check_end()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        check_end()
    finally:
        signal.signal(signal.SIGHUP, before)


TWICE = """
import os, signal, sys
sys.path[:0] = ["tests"]
from conftest import DistinctBatches, TinyRegression
from mlxmm import Callback, Trainer
class Twice(Callback):
    def on_train_batch_end(self, trainer, module, metrics, batches):
        os.kill(os.getpid(), int(sys.argv[2]))
    def on_exception(self, trainer, module, exception):  # before the last checkpoint is saved
        os.kill(os.getpid(), int(sys.argv[2]))
Trainer(max_steps=3, default_root_dir=sys.argv[1], logger=False, callbacks=Twice()).fit(
    TinyRegression(), DistinctBatches())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_end_the_last_checkpoint_of_a_program(tmp_path, number):
    command = [sys.executable, "-c", TWICE, str(tmp_path / "run"), str(int(number))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 128 + number, ended.stderr
    assert checkpoint.read_state(tmp_path / "run/checkpoints/last")["global_step"] == 1


def test_processes_that_must_agree_first_do_not_heed_a_signal_alone():
    with end_requests(alone=False) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        check_end()
    assert request.number == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_outside_of_a_fit_a_signal_ends_the_program_at_once(number):
    with pytest.raises(Ended) as caught, raised():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number and not isinstance(caught.value, Interrupted)


COMPILES = """
import sys
sys.path[:0] = ["tests"]
from conftest import DistinctBatches, TinyRegression
from mlxmm import Trainer
Trainer(max_steps=3, default_root_dir=sys.argv[1], logger=False).fit(TinyRegression(), DistinctBatches())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the compiler in /proc")
@pytest.mark.parametrize(("source", "step"), [("compiled_preamble.h", 1), (".cpp", 0)])  # the header of all, a kernel
def test_ctrl_c_while_a_kernel_is_compiled_ends_the_run_with_a_checkpoint(tmp_path, source, step):
    environment = os.environ | {"TMPDIR": str(tmp_path), "MLXMM_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILES, str(tmp_path / "run")]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, process_group=0)
    while child.poll() is None and not compiles(child.pid, source):
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in told, told
    assert checkpoint.read_state(tmp_path / "run/checkpoints/last")["global_step"] == step


def compiles(group: int, source: str) -> bool:
    """Whether a C++ compiler runs in this process group, on a file whose name ends so."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition(") ")
            arguments = stat.with_name("cmdline").read_text().split("\0")
        except OSError:
            continue
        is_source = any(argument.endswith(source) for argument in arguments)
        if "cc1plus" in name and int(rest.split()[2]) == group and is_source:
            return True
    return False
