"""What is written reaches the disk itself, also on macOS, where fsync stops at the disk's own cache; and is whole."""

import errno
import fcntl
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from mlxmm.storage.atomic import atomic_folder, cut_to_lines, new_folder, remove_leftovers, write_json, write_text

F_FULLFSYNC = 51  # its value on macOS


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """What reached the disk, and how, on a system that has F_FULLFSYNC."""
    calls: list[str] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: calls.append(f"fcntl {command}"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    return calls


def test_a_file_and_its_folder_reach_the_disk_by_f_fullfsync_where_that_exists(synced, tmp_path):
    write_text(tmp_path / "a", "text")
    assert synced == [f"fcntl {F_FULLFSYNC}"] * 2 and (tmp_path / "a").read_text() == "text"


def test_where_the_file_system_refuses_it_fsync_is_taken(synced, tmp_path, monkeypatch):
    def refuse(descriptor, command):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    write_text(tmp_path / "a", "text")
    assert synced == ["fsync"] * 2 and (tmp_path / "a").read_text() == "text"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has F_FULLFSYNC")
def test_elsewhere_fsync_is_taken(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    write_text(tmp_path / "a", "text")
    assert len(calls) == 2


def replace_folder(folder: Path, ends_at: int | None = None, waits: bool = False) -> None:
    """Replace `folder`, whose file says "old", in a process that ends by SIGKILL at its rename of this number."""
    rename, calls = os.rename, []

    def rename_or_end(source, target):
        if len(calls) == ends_at:
            os.kill(os.getpid(), 9)
        calls.append(target)
        rename(source, target)

    os.rename = rename_or_end
    with atomic_folder(folder) as temporary:
        (temporary / "file").write_text("new")
        (folder.parent / "began").touch()
        while waits:
            time.sleep(0.01)


def in_process(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=replace_folder, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize(("ends_at", "kept"), [(0, "old"), (1, "old"), (None, "new")])
def test_a_kill_at_any_rename_of_a_replacement_leaves_one_whole_folder_and_nothing_else(tmp_path, ends_at, kept):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    in_process(folder, ends_at).join()
    remove_leftovers(tmp_path)
    assert (folder / "file").read_text() == kept
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "began"}


def test_leftovers_of_a_killed_process_are_swept_and_not_what_a_living_one_writes(tmp_path):
    process = in_process(tmp_path / "folder", None, True)
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [f".tmp-{process.pid}-folder"]
    process.kill()
    process.join()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_an_export_sweeps_what_a_killed_one_left_of_it_and_nothing_else(tmp_path):
    for name in (".tmp-1-mine", ".tmp-1-not-mine", ".tmp-1-min"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "mine") as folder:
        (folder / "file").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", ".tmp-1-not-mine", ".tmp-1-min"}


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan"), "all": (1, float("-inf"))})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {"loss": None, "all": [1, None]}


@pytest.mark.parametrize(
    ("text", "kept"), [(b"", b""), (b"a\nb", b"a\n"), (b"ab", b""), (b"a\n" + b"b" * 10_000, b"a\n")]
)
def test_what_follows_the_last_newline_is_cut_off(tmp_path, text, kept):
    (tmp_path / "a").write_bytes(text)
    cut_to_lines(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == kept
