"""The journal: keys, not positions; what was added is there after kill -9; nothing is overwritten."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mlxmm.captioners.caption_writer import Sampling, WrittenCaption
from mlxmm.captioners.journal import FAILED, Journal
from mlxmm.captioners.prompts import find_prompts, first_sentence
from mlxmm.errors import UserError

ROOT = Path(__file__).parents[2]
OWN = {"writer": "shapes", "revision": "1", "sampling": Sampling()}


def caption(text):
    return WrittenCaption(text=text, num_tokens=len(text.split()), finish_reason="stop")


def test_captions_are_found_by_image_and_prompt_in_an_order_of_their_own(tmp_path):
    pairs = [("b", "short", caption("two")), ("a", "short", caption("one")), ("a", "alt", caption("three"))]
    tables = []
    for number, order in enumerate((pairs, pairs[::-1])):
        journal = Journal(tmp_path / f"{number}.sqlite", **OWN)
        for pair in order:
            journal.add([pair])
        assert journal.written() == {("a", "short"), ("a", "alt"), ("b", "short")}
        tables.append([(e.image, e.prompt, e.text, e.num_tokens) for e in journal.entries()])
        journal.close()
    assert tables[0] == tables[1] == [("a", "alt", "three", 1), ("a", "short", "one", 1), ("b", "short", "two", 1)]


@pytest.mark.parametrize(
    "other", [{"writer": "another"}, {"revision": "2"}, {"sampling": Sampling(temperature=1.0)}], ids=str
)
def test_another_writer_revision_or_sampling_has_captions_of_its_own(other, tmp_path):
    one, two = (Journal(tmp_path / "j.sqlite", **OWN | changes) for changes in ({}, other))
    one.add([("a", "short", caption("one"))])
    assert two.written() == set()
    two.add([("a", "short", caption("two"))])
    assert [e.text for e in one.entries()] == ["one"] and [e.text for e in two.entries()] == ["two"]


def test_a_caption_is_never_overwritten_and_a_batch_is_added_whole_or_not_at_all(tmp_path):
    journal = Journal(tmp_path / "j.sqlite", **OWN)
    journal.add([("a", "short", caption("one"))])
    with pytest.raises(sqlite3.IntegrityError):
        journal.add([("b", "short", caption("new")), ("a", "short", caption("other"))])
    assert [e.text for e in journal.entries()] == ["one"]


def test_a_failure_is_noted_with_its_reason_and_not_asked_for_again(tmp_path):
    journal = Journal(tmp_path / "j.sqlite", **OWN)
    journal.add_failure("a", "short", "out of memory")
    assert journal.written() == {("a", "short")}
    [entry] = journal.entries()
    assert (entry.finish_reason, entry.reason, entry.text) == (FAILED, "out of memory", "")


def test_what_was_added_is_there_after_kill_9(tmp_path):
    code = """if True:
        import os, signal, sys
        sys.path.insert(0, "tests/captioners")
        from test_journal import *
        journal = Journal(Path(sys.argv[1]), **OWN)
        for number in range(5):
            journal.add([(str(number), "short", caption("text"))])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path / "j.sqlite")], cwd=ROOT, env=environment)
    assert child.returncode == -signal.SIGKILL
    assert len(Journal(tmp_path / "j.sqlite", **OWN).written()) == 5


def test_a_file_that_is_no_journal_is_one_line(tmp_path):
    (tmp_path / "j.sqlite").write_bytes(b"not a journal" * 100)
    with pytest.raises(UserError, match="cannot be opened as a journal"):
        Journal(tmp_path / "j.sqlite", **OWN)


def test_prompts_have_ids_and_an_unknown_one_is_refused():
    assert list(find_prompts(("short", "mine"), own=("mine=Say what you see.",)).values())[1] == "Say what you see."
    for ids, own in ((("shrot",), ()), ((), ()), (("alt", "alt"), ()), (("x",), ("no equals sign",))):
        with pytest.raises(UserError):
            find_prompts(ids, own)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A dog. It runs.", "A dog."),
        ("A dog", "A dog"),
        ("A dog.", "A dog."),
        ("", ""),
        (" 3.5 m of rope. x", "3.5 m of rope."),
    ],
)
def test_the_first_sentence(text, first):
    assert first_sentence(text) == first


def test_a_full_disk_is_one_line_and_what_was_added_stays(tmp_path):
    journal = Journal(tmp_path / "captions.sqlite", **OWN)
    journal.add([("a", "short", caption("one"))])
    journal._connection.execute("PRAGMA max_page_count = 1")  # SQLite then says what it says on a full disk
    with pytest.raises(UserError, match="captions.sqlite cannot be written: database or disk is full"):
        journal.add([(str(i), "short", caption("two " * 500)) for i in range(50)])
    assert [entry.text for entry in journal.entries()] == ["one"]
    journal.close()
