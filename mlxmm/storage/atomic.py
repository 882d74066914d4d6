"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed into it."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import mlx.core as mx

from mlxmm.errors import UserError
from mlxmm.storage.disk import naming
from mlxmm.storage.json_values import dumps

TEMPORARY = ".tmp-"  # prefix of files and folders that are not complete yet
REPLACED = ".old-"  # prefix of a folder whose successor is being put in its place
LONGEST_NAME = 255  # bytes, of a file


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is renamed to `path`, after it reached the disk."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")  # the suffix stays: MLX reads it
    try:
        with naming(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it is renamed to `path`. A folder that exists is moved aside until
    the new one is in its place."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    lock = _make_locked(temporary)
    try:
        with naming(path):
            yield temporary
            for file in [*temporary.rglob("*"), temporary]:
                _flush(file)
            _replace_folder(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _make_locked(folder: Path) -> int:
    """Make `folder` and lock it as long as the descriptor is open: so `remove_leftovers` knows that its maker lives."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        os.close(descriptor)  # another process took it for a leftover just before it was locked


def _replace_folder(path: Path, new: Path) -> None:
    """Rename `new` to `path`. After a kill between the two renames `remove_leftovers` puts the old one back."""
    old = path.with_name(f"{REPLACED}{path.name}")
    if path.is_file():
        move_aside(path)
    if path.exists():
        _remove(old)
        os.rename(path, old)
    os.rename(new, path)
    _flush(path.parent)
    _remove(old)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Like `atomic_folder`, but never replaces anything: raises `UserError` if `path` exists and is not empty."""
    path = path.absolute()
    remove_leftovers(path.parent, path.name)  # first, as it may put a folder back
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty: name another folder")
    with atomic_folder(path) as temporary:
        yield temporary


def write_text(path: Path, text: str) -> None:
    r"""Write `text` in UTF-8: `path` then holds all of it, or what it held before. What UTF-8 has not, as bytes of a
    file's name that are no text, is written as Python writes it: `\udcff`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value) -> None:
    """Write `value` as JSON, whole or not at all. Numbers that are not finite become null, as JSON has none."""
    write_text(path, dumps(value, indent=2) + "\n")


def read_arrays(path: Path, **options):
    """The arrays of a safetensors file, by `mx.load`. Raises `UserError` if it is missing or damaged."""
    try:
        return mx.load(str(path), **options)
    except RuntimeError as error:
        raise UserError(f"{path} is missing or damaged: {str(error).splitlines()[0]}") from None


def write_arrays(path: Path, arrays: dict[str, mx.array], **options) -> None:
    """Write a safetensors file, by `mx.save_safetensors`. Raises `OSError` if the disk is full or does not work."""
    try:
        mx.save_safetensors(str(path), arrays, **options)
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free / 2**30
        raise OSError(errno.EIO, f"{str(error).splitlines()[0]} {free:.1f} GiB are free", str(path)) from None


def replace_link(link: Path, target: Path) -> None:
    """Make the symlink `link` point to its neighbour `target`, in one step if it exists already.

    On a file system without links (exFAT, some network shares) it is a file that holds the name, as in Git.
    """
    if link.is_symlink() and link.readlink() == Path(target.name):
        return
    temporary = link.with_name(f"{TEMPORARY}{os.getpid()}-{link.name}")
    temporary.unlink(missing_ok=True)
    if link.is_dir() and not link.is_symlink():
        move_aside(link)
    try:
        temporary.symlink_to(target.name)
    except OSError:
        write_text(link, target.name)
        return
    os.replace(temporary, link)
    _flush(link.parent)


def follow_link(path: Path) -> Path:
    """The neighbour that `path` names, if it is a file that stands for a link; else `path`, as all others read it."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LONGEST_NAME:
        return path
    named = path.with_name(Path(path.read_text(errors="replace").strip()).name or path.name)
    return named if named.is_dir() else path


def move_aside(path: Path) -> None:
    """Rename what is in the way of a new file or folder, and is not ours to delete: `path.old0` and so on."""
    path.rename(next(name for n in count() if not (name := path.with_name(f"{path.name}.old{n}")).exists()))


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Delete what killed processes left incomplete in `folder`, or that alone which was to become `name`, and nothing
    that another process is writing. A folder that was being replaced, and has no successor yet, is put back first."""
    for old in folder.glob(f"{REPLACED}{glob.escape(name) or '*'}"):
        path = old.with_name(old.name.removeprefix(REPLACED))
        if any(map(_is_being_written, folder.glob(f"{TEMPORARY}*-{path.name}"))):
            continue
        if path.exists():
            _remove(old)
        else:
            old.rename(path)
    for path in folder.glob(f"{TEMPORARY}*"):
        if (not name or path.name.split("-", 2)[2:] == [name]) and not _is_being_written(path):
            _remove(path)


def _is_being_written(path: Path) -> bool:
    """Whether a living process has the lock of a temporary folder, or may have it, where there are no locks; of files
    none has."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cut_to_lines(path: Path) -> None:
    """Cut off what follows the last newline of a file: what a kill, or a full disk, left of a line."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 4_096)
            file.seek(start)
            if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(descriptor: int) -> None:
    """fsync; on macOS F_FULLFSYNC, because fsync waits only for the disk's cache there, which a power cut empties."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # network file systems and some external disks refuse it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
