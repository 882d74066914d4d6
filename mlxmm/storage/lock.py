"""A lock on a folder: one process at a time writes a run."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mlxmm.errors import UserError

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
