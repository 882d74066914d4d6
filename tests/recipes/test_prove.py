"""`make prove`: each claim gets a verdict, and only what holds gives exit code 0."""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from tools import prove
from tools.proof_report import FAILS, HOLDS, NOT_TRIED, judged, not_tried
from tools.prove_machine import flushed
from tools.prove_numbers import differences, parity_lines, small_aligner, step
from tools.prove_training import GIB, verdicts

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_that_is_tried_here_holds(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLXMM_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tools.prove", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    verdicts = re.findall(r"^\| (.*?) \| \*\*(.*?)\*\* \| (.*?) \|$", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and len(verdicts) == 10, done.stdout + done.stderr
    assert {verdict for _, verdict, _ in verdicts} <= {HOLDS, NOT_TRIED}
    assert verdicts[0][1] == HOLDS and "weights, optimizer, metrics" in verdicts[0][2]
    if mx.default_device() == mx.cpu:
        assert [why for _, verdict, why in verdicts if verdict == NOT_TRIED][:2] == ["no GPU"] * 2
    assert str(tmp_path) not in done.stdout  # it is pasted into an issue


def test_a_claim_that_does_not_hold_and_a_check_that_fails_give_exit_code_1(monkeypatch, capsys):
    def broken(quick):
        raise RuntimeError("out of | memory")

    monkeypatch.setattr(sys, "argv", ["prove"])
    for checks, code in (((lambda quick: [not_tried("x", "no GPU")],), 0), ((broken,), 1)):
        monkeypatch.setattr(prove, "CHECKS", checks)
        with pytest.raises(SystemExit) as ended:
            prove.main()
        assert ended.value.code == code
    assert f"| broken | **{FAILS}** | RuntimeError: out of / memory |" in capsys.readouterr().out


def test_the_same_step_twice_is_the_same_and_another_one_is_found():
    module = small_aligner()
    exact, again, half = (step(module, p, mx.cpu) for p in ("32", "32", "bf16-mixed"))
    assert differences(exact, again) == (0, 0) and 0 < differences(half, exact)[1] < 0.1
    wrong = exact[0], 1.01 * exact[1]
    coarse = exact[0], exact[1] + 3 * (half[1] - exact[1])
    assert [line.verdict for line in parity_lines(exact, again, half, half)] == [HOLDS, HOLDS]
    assert [line.verdict for line in parity_lines(exact, wrong, half, coarse)] == [FAILS, FAILS]


def test_a_peak_above_the_plan_and_a_plan_above_the_machine_do_not_hold():
    class Plan:
        total, kept = 3 * GIB, GIB

    peaks = [verdicts("", Plan, [1.0], peak)[0].verdict for peak in (2 * GIB, 2 * GIB + 1)]
    assert peaks == [HOLDS, FAILS]
    Plan.total = 2**60
    assert verdicts("", Plan, [1.0], 1)[1].verdict == FAILS


def test_f_fullfsync_is_tried_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFD, raising=False)  # a command that every system takes
    assert flushed("x", tmp_path).verdict == HOLDS
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 9_999)
    line = flushed("x", tmp_path)
    assert line == judged("x", False, "refused: Invalid argument; fsync is used there")
    monkeypatch.delattr(fcntl, "F_FULLFSYNC")
    assert flushed("x", tmp_path).verdict == NOT_TRIED
