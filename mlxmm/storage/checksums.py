"""Checksums of files, by which damaged ones are found before they are used."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mlxmm.errors import UserError
from mlxmm.storage.atomic import sha256


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in `folder` and below, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def check_files(folder: Path, files: Mapping[str, str], advice: str) -> None:
    """Raise `UserError` that names the first of `files` that is missing or is not what its checksum says."""
    for name, checksum in files.items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise UserError(f"{folder / name} is missing or damaged; {advice}")


def checksum_of_values(values) -> str:
    """The SHA-256 of JSON values, in whatever order their keys are."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    """The checksum of a file, computed once as long as the file stays what it is.

    Finding a run's newest checkpoint verifies it, and so does loading it: of a model of some GB, seconds each.
    """
    stat = path.stat()
    return _checksum_of(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=64)
def _checksum_of(path: Path, *identity: int) -> str:
    return sha256(path)
