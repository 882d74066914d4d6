"""Checks of the machine: limits that MLX keeps, and files that reach the disk."""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlxmm.compute import memory
from mlxmm.compute.memory import GIB
from mlxmm.environment import cache_root
from tools.proof_report import Line, judged, not_tried

TRIED_CACHE = GIB // 2  # bytes
CACHE = "the limit of freed memory that a run sets is the one that MLX has"
WIRED = "the limit of wired memory that a run sets is the one that MLX has"
FULL_FSYNC = "a file is flushed to the disk itself by F_FULLFSYNC in {}"


def limits(quick: bool) -> list[Line]:
    """What a run sets, read back while it is set. Without Metal a run leaves MLX's own: then half a GiB is tried."""
    if not mx.metal.is_available():
        with memory.limited(TRIED_CACHE / GIB, None):
            return [_read_back(CACHE, mx.set_cache_limit, TRIED_CACHE), not_tried(WIRED, "no Metal")]
    working_set = memory.working_set()
    with memory.limited(None, None):
        return [
            _read_back(CACHE, mx.set_cache_limit, int(memory.KEPT_SHARE * working_set)),
            _read_back(WIRED, mx.set_wired_limit, int(memory.WIRED_SHARE * working_set)),
        ]


def _read_back(claim: str, set_limit: Callable[[int], int], expected: int) -> Line:
    found = set_limit(expected)  # MLX tells a limit only when it is set
    return judged(claim, abs(found - expected) <= 1, f"set {expected / GIB:.2f} GiB, read {found / GIB:.2f} GiB")


def full_fsync(quick: bool) -> list[Line]:
    """Where runs and the cache are written: macOS's fsync stops at the disk's cache."""
    places = {"the working directory": Path.cwd(), "the cache": cache_root()}
    return [flushed(FULL_FSYNC.format(name), folder) for name, folder in places.items()]


def flushed(claim: str, folder: Path) -> Line:
    if not hasattr(fcntl, "F_FULLFSYNC"):
        return not_tried(claim, "macOS alone has it; here fsync waits for the disk")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(os.urandom(2**20))
        file.flush()
        start = time.perf_counter()
        try:
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
        except OSError as error:
            return judged(claim, False, f"refused: {error.strerror}; fsync is used there")
        return judged(claim, True, f"1 MiB in {1e3 * (time.perf_counter() - start):.0f} ms")
