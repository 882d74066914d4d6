"""The cache: folders that are made once and found again, under one root. Damaged ones are made again."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlxmm import environment
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.storage.atomic import atomic_folder, remove_leftovers, write_json
from mlxmm.storage.checksums import check_files, checksums
from mlxmm.storage.lock import taking_turns
from mlxmm.storage.pretrained import read_json
from mlxmm.terminal import say

CHECKSUMS = "checksums.json"  # in each folder: of all its files


def cache_folder(name: str) -> Path:
    """The folder of this name in the cache ($MLXMM_CACHE, or ~/.cache/mlxmm)."""
    return environment.cache_root() / name


def cached(name: str, key, make: Callable[[Path], None]) -> Path:
    """The folder of what `make(folder)` wrote for `key` (JSON values), now or in an earlier run; whole or absent.

    A collective call: all processes take part in the making, and rank 0 keeps what it made. Raises `UserError` if the
    cache cannot be written. A folder with a damaged file is made again, which a line says. Of several processes that
    want the same, one makes it, and the others wait.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder(f"{name}-{digest}")
    with taking_turns(folder) if collectives.rank() == 0 else contextlib.nullcontext():
        if not collectives.broadcast_object(lambda: _is_whole(folder)):
            _make(folder, make)
    return collectives.broadcast_paths(lambda: [folder])[0]


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    if collectives.rank() == 0:
        _require_root()
    with atomic_folder(folder) if collectives.rank() == 0 else tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))
        write_json(Path(temporary) / CHECKSUMS, checksums(Path(temporary)))


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache is there, with the files that were written, as they were written."""
    remove_leftovers(folder.parent)
    if not folder.exists():
        return False
    try:
        present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        unknown = dict.fromkeys(present, "") | {CHECKSUMS: ""}
        files = unknown | read_json(folder / CHECKSUMS)
        check_files(folder, {name: files[name] for name in files if name != CHECKSUMS}, "it is made again")
    except UserError as error:
        say(f"the cache is damaged: {error}")
        return False
    return True


def _require_root() -> None:
    """Make the root of the cache, and a file in it."""
    root = environment.cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(f"the cache {root} cannot be written: {error.strerror}; name another by MLXMM_CACHE") from None


def made_in(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder` with what `make(folder)` wrote on rank 0: for what is not to be kept. A collective call."""
    with contextlib.nullcontext(folder) if collectives.rank() == 0 else tempfile.TemporaryDirectory() as place:
        Path(place).mkdir(parents=True, exist_ok=True)
        make(Path(place))
    return collectives.broadcast_paths(lambda: [folder])[0]


def size_of(folder: Path) -> int:
    """Bytes of the files in `folder` and below; links are not followed. 0 if it is not there."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile, or not ours to look at
            size += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
    return size
