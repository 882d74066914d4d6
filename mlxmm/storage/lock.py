"""Locks between the processes of a machine: one at a time writes a run, or makes an entry of the cache."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mlxmm.distributed.signals import check_end
from mlxmm.errors import UserError
from mlxmm.terminal import say

LOCK = ".lock-"  # prefix of a file that is there while an entry is made
POLL = 0.2  # seconds

_held: set[tuple[int, Path]] = set()  # by this process


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process on this machine has the lock of `folder`, which is made if it is missing.

    A block within the block may lock it again. The lock leaves no file, and ends with the process, however that ends.
    Raises `UserError` if another process has it. File systems without locks protect nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = os.getpid(), folder.resolve()
    if key in _held:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        _held.add(key)
        yield
    finally:
        _held.discard(key)
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            told = "wait until it ends, or stop it; or name another folder"
            raise UserError(f"another process is writing the run in {folder}: {told}") from None


@contextlib.contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Within the block no other process on this machine is in a block for `path`, which may be missing: this one waits
    for it, and says so. It ends with the process that has it. Where nothing can be locked, there is no waiting."""
    beside = path.with_name(f"{LOCK}{path.name}")
    descriptor = _wait_for(beside, path)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                beside.unlink()  # while it is locked: whoever waits for this file finds that it is gone
            os.close(descriptor)


def _wait_for(lock: Path, path: Path) -> int | None:
    has_told = False
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # a cache that may be read alone
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    return descriptor
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
                return None
            if not has_told:
                say(f"another process makes {path}: this one waits for it")
            has_told = True
            check_end()
            time.sleep(POLL)
