"""What is written reaches the disk itself, also on macOS, where fsync stops at the disk's own cache."""

import errno
import fcntl
import os
import sys

import pytest

from mlxmm.storage.atomic import write_text

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
