"""Checksums of files, by which damaged ones are found before they are used."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mlxmm.errors import UserError
from mlxmm.escaping import visible
from mlxmm.storage.atomic import sha256


def checksums(folder: Path, known: Mapping[str, str] = {}) -> dict[str, str]:
    """The SHA-256 of each file in `folder` and below, by its relative path; those that are `known` are not read."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: known[name] if name in known else sha256(folder / name) for name in names}


def check_files(folder: Path, files: Mapping[str, str], advice: str) -> None:
    """Raise `UserError` that names the first of `files` that is missing or is not what its checksum says."""
    for name, checksum in files.items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise UserError(f"{visible(folder / name)} is missing or damaged; {advice}")


def checksum_of_values(values) -> str:
    """The SHA-256 of JSON values, in whatever order their keys are."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def identity(path: Path) -> tuple[int, ...]:
    """What changes where a file is replaced or written, and stays where it is renamed or linked."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


MAX_KNOWN = 64
_known: dict[tuple[int, ...], str] = {}  # checksums by the identity of files


def _checksum(path: Path) -> str:
    """The checksum of a file, computed once as long as the file stays what it is, under whatever names.

    Finding a run's newest checkpoint verifies it, and so does loading it: of a model of some GB, seconds each.
    """
    key = identity(path)
    if key not in _known:
        _known[key] = sha256(path)
        while len(_known) > MAX_KNOWN:
            del _known[next(iter(_known))]  # the oldest
    return _known[key]
