"""Ranks of `mlx.launch` that are disturbed at a moment of a run, one at a time: what becomes of all of them.

python -m pytest -m slow -v tests/distributed/test_ranks_and_launcher.py
"""

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DistinctBatches, TinyRegression
from test_distributed import IMPORTS, Shards, hostfiles, run_workers, trainer  # noqa: F401

from mlxmm import Callback
from mlxmm.callbacks import ModelCheckpoint
from mlxmm.distributed import collectives
from mlxmm.distributed.watchdog import TICK
from mlxmm.storage import checkpoint
from mlxmm.storage.checkpoint import step_of
from mlxmm.storage.checkpoint_folder import named

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hostfiles")]
ROOT = Path(__file__).parents[2]
TIMEOUT = "4"  # seconds, of ranks

# ---- what the ranks run: `python test_ranks_and_launcher.py FOLDER MOMENT ACTION RANK`

ACTIONS = {
    "KILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "TERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "STOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": lambda: 1 / 0,
    "nothing": lambda: None,
}


class Disturbed(TinyRegression):
    """A module with a validation, whose checkpoints rank 0 writes in a thread."""

    act = staticmethod(lambda: None)

    def validation_step(self, batch):
        return self.training_step(batch)

    def save_config(self, folder):
        if self.trainer.global_step >= 4:
            self.act()


class Disturb(Callback):
    """Does something at a moment of the run."""

    def __init__(self, moment, act):
        self.moment, self.act = moment, act

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if self.moment == "training" and trainer.global_step == 5:
            self.act()
        if self.moment == "long":
            time.sleep(0.02)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        if self.moment == "validation" and trainer.global_step == 4 and batch_idx == 1:
            self.act()

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if self.moment == "saving" and trainer.global_step == 4:
            self.act()


class FullDisk(Callback):
    """This process cannot write longer files from the update `since` until the update `until`."""

    def __init__(self, since, until):
        self.since, self.until = since, until
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def on_train_batch_start(self, trainer, module, batches):
        if trainer.global_step in (self.since, self.until):
            size = 200 if trainer.global_step == self.since else self.limit
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.limit))


def work(folder, moment, action, who, *_):
    own = os.environ["MLX_RANK"] == who
    act = ACTIONS.get(action, ACTIONS["nothing"]) if own else ACTIONS["nothing"]
    if moment == "start":
        act()
    module = Disturbed()
    module.act = act if moment == "writing" else ACTIONS["nothing"]
    full = [FullDisk(5, {"a while": 8}.get(action))] if moment == "full disk" and own else []
    settings = {"max_steps": 100_000 if moment == "long" else 9, "val_check_interval": 2, "num_sanity_val_steps": 0}
    settings |= {"callbacks": [Disturb(moment, act), *full, ModelCheckpoint(every_n_train_steps=2, background=False)]}
    goes_on = {"ckpt_path": "last"} if moment == "resume" else {}
    try:
        trainer(folder, **settings).fit(module, Shards(), DistinctBatches(4), **goes_on)
    except BaseException as error:
        if moment == "long":
            time.sleep(3 * TICK)  # as a program that tidies up, while its watchdog sees that the launcher is gone
        (folder / f"ended{collectives.rank()}").write_text(str(getattr(error, "code", type(error).__name__)))
        raise
    (folder / f"ended{collectives.rank()}").write_text("well")


# ---- the tests


@contextlib.contextmanager
def launched(*arguments, num=2, **streams):
    """`mlx.launch` with ranks of this file; what is still there at the end is killed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = "from mlx._distributed_utils.launch import main; main()"
    ranks = ["-n", str(num), "--backend", "ring", "-p", str(port), "--", sys.executable, __file__]
    environment = os.environ | {"PYTHONPATH": f"{IMPORTS}:{ROOT}", "MLXMM_RANK_TIMEOUT": TIMEOUT}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, [*ranks, *arguments])],
        **({"env": environment, "cwd": ROOT, "text": True, "start_new_session": True} | streams),
    )
    try:
        yield process
    finally:
        for group in {process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.wait()


def told_by(*arguments, **options) -> str:
    """What a launch tells, which has to end within half a minute."""
    with launched(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        return process.communicate(timeout=30)[0]


def ended(folder) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("ended*"))]


def kept(folder) -> int:
    """The step of the newest checkpoint, whose files are whole."""
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)["state"]["global_step"]


SAID = {
    "KILL": "rank {who} (died|exited with code -9)",  # which the launcher may say first
    "STOP": "rank {who} (hangs|has been silent)",
    "raises": "rank {who} failed: ZeroDivisionError|ZeroDivisionError: division by zero",
}
DISTURBED = [
    (moment, action, who)
    for moment in ("training", "validation", "saving", "writing")
    for action in ("KILL", "TERM", "STOP", "raises")
    for who in (0, 1)
    if (moment, who) != ("writing", 1)  # rank 0 alone writes
]


@pytest.mark.parametrize(("moment", "action", "who"), DISTURBED)
def test_a_disturbed_rank_ends_all_with_a_reason_and_a_whole_checkpoint(tmp_path, moment, action, who):
    told = told_by(tmp_path, moment, action, who)
    if action == "TERM":
        assert set(ended(tmp_path)) == {"143"} and "Traceback" not in told, told
        assert f"kept {tmp_path}/checkpoints/step={5 if moment == 'training' else 4}" in told
    else:
        assert re.search(SAID[action].format(who=who), told), told
        assert "well" not in ended(tmp_path)
    assert kept(tmp_path) >= 2


@pytest.mark.parametrize("action", ["KILL", "TERM", "raises"])
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_ends_before_the_others_meet_it_ends_all(tmp_path, action, who):
    assert f"rank {who} exited with code" in (told := told_by(tmp_path, "start", action, who)), told
    assert "well" not in ended(tmp_path)


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_stops_before_the_others_meet_it_is_named(tmp_path, who):
    with launched(tmp_path, "start", "STOP", who, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        lines = iter(process.stderr.readline, "")
        assert any(f"rank {who} did not come within {TIMEOUT} s" in line for line in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_end_of_the_launcher_is_a_request_to_end_with_a_checkpoint(tmp_path, number):
    with launched(tmp_path, "long", "nothing", 0, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: step_of(named(tmp_path / "checkpoints", "last") or Path("step=0")) >= 20)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
            process.stdout.close(), process.stderr.close()  # nobody reads what the ranks print
        wait_until(lambda: len([*filter(None, ended(tmp_path))]) == 2)
    assert ended(tmp_path) == ["130" if number == signal.SIGINT else "143"] * 2 and kept(tmp_path) >= 20


def wait_until(is_so, seconds=30):
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_so()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_does_not_resume(tmp_path, before, after):
    told_by(tmp_path, "training", "nothing", 0, num=before)
    told = told_by(tmp_path, "resume", "nothing", 0, num=after)
    assert re.search(f"is of a run of {before} process(es)?, and now there (is|are) {after}", told), told
    assert kept(tmp_path) == 9


def test_ranks_with_other_flags_do_not_start(tmp_path):
    code = "import os, runpy, sys; sys.argv = [sys.argv[1], *sys.argv[2:], 'x' * int(os.environ['MLX_RANK'])]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    ranks, _ = run_workers("-c", code, __file__, tmp_path, "training", "nothing", 0)
    assert all(code != 0 for code, _, _ in ranks) and "flags" in ranks[0][2], ranks
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_that_rank_0_cannot_write_costs_itself_on_all_ranks(tmp_path):
    told = told_by(tmp_path, "full disk", "a while", 0)
    assert told.count("the checkpoint of step 6 cannot be written") == 1 and "training goes on" in told, told
    assert ended(tmp_path) == ["well", "well"] and kept(tmp_path) == 9
    told = told_by(tmp_path, "resume", "nothing", 0)
    assert ended(tmp_path) == ["well", "well"], told


def test_a_last_checkpoint_that_rank_0_cannot_write_ends_all_ranks_with_the_reason(tmp_path):
    told = told_by(tmp_path, "full disk", "for ever", 0)
    assert "the checkpoint of step 9 cannot be written" in told and "well" not in ended(tmp_path), told
    assert kept(tmp_path) == 4


def test_a_full_disk_of_another_rank_than_0_costs_nothing(tmp_path):
    assert "cannot be written" not in told_by(tmp_path, "full disk", "for ever", 1)
    assert ended(tmp_path) == ["well", "well"] and kept(tmp_path) == 9


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
