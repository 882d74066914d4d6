"""What was found about files once, and is read back at later starts: one file of the cache for each finding.

    <cache>/<kind>/<SHA-256 of the key>    SHA-256 of the bytes, then the bytes

A key names everything that the finding follows from, so that a file stays right as long as it is found. Of a kind those
that were used last are kept.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mlxmm.storage.atomic import atomic_file
from mlxmm.storage.cache import cache_folder
from mlxmm.storage.lock import taking_turns

NUM_DIGEST_BYTES = hashlib.sha256().digest_size
MAX_KEPT = 256  # findings of a kind: a source of three splits has at most three


def remembered(kind: str, key: bytes, make: Callable[[], bytes]) -> bytes:
    """What `make()` returned for `key`, now or at an earlier start. A file that is damaged is made again.

    Of several processes on a machine that want the same, one makes it, and the others wait. A cache that cannot be
    written costs time only. No collective call.
    """
    path = cache_folder(kind) / hashlib.sha256(key).hexdigest()
    if (found := _read(path)) is not None:
        with contextlib.suppress(OSError):
            os.utime(path)
        return found
    with taking_turns(path):
        if (found := _read(path)) is None:
            _write(path, found := make())
    return found


def state_of_files(paths: Sequence[str | Path]) -> bytes:
    """What tells files from other versions of them, as a key: path, size and time of each.

    Raises `OSError` if one is missing.
    """
    digest = hashlib.sha256()
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{path}:{stat.st_size}:{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.digest()


def _read(path: Path) -> bytes | None:
    try:
        checksum, value = (data := path.read_bytes())[:NUM_DIGEST_BYTES], data[NUM_DIGEST_BYTES:]
    except OSError:
        return None
    return value if hashlib.sha256(value).digest() == checksum else None


def _write(path: Path, value: bytes) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(hashlib.sha256(value).digest() + value)
        _delete_oldest(path.parent)


def _delete_oldest(folder: Path) -> None:
    """Delete the findings in a folder that were used longest ago. Raises `OSError`, also if another process does it."""
    used = sorted(((path.stat().st_mtime_ns, path) for path in folder.glob("[0-9a-f]*")), reverse=True)
    for _, path in used[MAX_KEPT:]:
        path.unlink()
