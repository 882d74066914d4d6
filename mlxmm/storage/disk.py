"""Disks that are full or do not work: what cannot be written costs itself, and not the run."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from mlxmm.terminal import say

# What the machine lacks, not the program: room, rights, a disk or a network share that works, free descriptors; and a
# path on which there is something else, or nothing any more, or which is too long.
LACKS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "ESTALE", "ENXIO", "ENODEV", "EMFILE")
IN_THE_WAY = ("ENOENT", "EEXIST", "EISDIR", "ENOTDIR", "ENOTEMPTY", "ELOOP", "ENAMETOOLONG", "EBUSY", "ETXTBSY")
OF_THE_MACHINE = {getattr(errno, name) for name in (*LACKS, *IN_THE_WAY)}


def is_of_the_machine(error: BaseException | None) -> bool:
    """Whether the disk, or what lies on it, is what failed."""
    return isinstance(error, OSError) and error.errno in OF_THE_MACHINE


def reason(error: OSError) -> str:
    """What failed, in a line: the file, if it is known, and why."""
    return ": ".join(filter(None, [error.filename and str(error.filename), error.strerror]))


def require_file(path: Path) -> None:
    """Raise `OSError` for a pipe or a device, which might be waited for without end. What is missing passes."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.ENXIO, "Is neither a file nor a link to one", str(path))


def read_text(path: Path) -> str:
    """The text of a file, which is UTF-8 whatever the locale. Raises `OSError` as `require_file` does, and `ValueError`
    for what is no text."""
    require_file(path)
    return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` of the block that names no file names `path`: those of a write do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def going_on(what: str) -> Iterator[None]:
    """Within the block a disk that fails costs `what` alone, which a line says."""
    try:
        yield
    except OSError as error:
        if not is_of_the_machine(error):
            raise
        say(f"warning: {what} cannot be written, the run goes on: {reason(error)}")
