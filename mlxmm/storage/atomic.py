"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed into it."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from mlxmm.errors import UserError

TEMPORARY = ".tmp-"  # begins the name of whatever is not whole yet


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path`, at once and for good."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")  # the suffix stays: MLX reads it
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `path`. A folder already there is kept aside
    until the new one stands in its place."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _flush(file)
        if path.exists():
            aside = temporary.with_name(temporary.name + "-old")
            os.rename(path, aside)
            os.rename(temporary, path)
            shutil.rmtree(aside)
        else:
            os.rename(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """As `atomic_folder`, for what must replace nothing. Raises `UserError` where `path` holds something already."""
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already, and not empty: name another folder")
    with atomic_folder(path) as temporary:
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or what it held before."""
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_arrays(path: Path, **options):
    """What `mx.load` reads of a safetensors file. Raises `UserError` where it is missing or damaged."""
    try:
        return mx.load(str(path), **options)
    except RuntimeError as error:
        raise UserError(f"{path} is missing or damaged: {str(error).splitlines()[0]}") from None


def replace_symlink(link: Path, target: Path) -> None:
    """Make `link` name its neighbour `target`, replacing what it named before in one step."""
    temporary = link.with_name(f"{TEMPORARY}{os.getpid()}-{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)
    _flush(link.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what a process that was killed left unfinished in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sha256(path: Path) -> str:
    """The checksum of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
