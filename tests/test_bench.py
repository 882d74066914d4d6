"""The bench: its rows name sides that are there, and one that cannot run says why."""

import importlib
import io
import sys

import pytest

from tools.bench.__main__ import agreement, cells, measure, summary, why
from tools.bench.child import Case, serve
from tools.bench.rows import ROWS

CASE = {"folder": "", "device": "cpu", "threads": 1, "quick": True, "options": {"size": "small"}}


class Arguments:
    peers, quick, repeats = None, True, 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_names_two_sides_that_are_there(row):
    for side in (row.ours, row.theirs):
        module, function = side.split(":")
        assert callable(getattr(importlib.import_module(f"tools.bench.{module}"), function))


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if "start" not in row.name], ids=lambda row: row.name)
def test_our_side_of_every_row_gives_numbers(row, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    answers = []
    serve(row.ours, Case(**CASE | {"folder": tmp_path, "options": row.options}), answers.append)
    assert len(answers) == 2 and answers[1]["cpu"] > 0


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    answers = []
    serve("clip_step:theirs", Case(**CASE), answers.append)
    assert len(answers) == 1 and "torch" in answers[0]["cannot"]


def test_a_row_without_its_peers_or_for_another_device_says_so_in_the_table():
    overhead, clip = ROWS[0], ROWS[1]
    for row, device, reason in (
        (clip, "cpu", "needs --peers, a Python with torch, transformers"),
        (overhead, "cuda", "is for a CPU, and MLX computes on cuda"),
    ):
        line = summary(row, 1, measure(row, 1, Arguments, device), device)
        assert line["cannot"] == reason and reason in cells(line)[0]


def test_turns_are_measured_and_the_first_one_is_not(monkeypatch):
    side = importlib.import_module("tools.bench.checkpoints")
    monkeypatch.setattr(side, "ours", lambda case: lambda: {"check": [1.0]})
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    answers = []
    serve("checkpoints:ours", Case(**CASE), answers.append)
    first, *turns = answers
    assert first == {"check": [1.0]} and [turn.keys() for turn in turns] == [{"cpu", "wall", "check"}] * 2


def test_losses_agree_to_a_thousandth():
    assert agreement([1.0, 2.0], [1.0005, 2.1]) == 0.5
    assert agreement([1.0], [1.0, 1.0]) == 0.0 and agreement(None, [1.0]) is None


def test_a_side_that_fails_tells_its_exception_and_not_a_note_after_it():
    log = [
        "Traceback (most recent call last):",
        '  File "x.py"',
        "builtins.ValueError: no rows",
        "A note about frames.",
    ]
    assert why(log) == "builtins.ValueError: no rows"
    assert why(["Killed"]) == "Killed" and why([]) == "no message"
