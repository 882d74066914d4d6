"""Pixels of pictures, decoded and resized once and kept on disk: a file for the pictures of some rows.

    <folder>/<key>.pixels    N records in the order of the rows: H * W * 3 bytes, and their CRC-32

N rows, H x W pixels. A record is written when its row is first read, and counts if its checksum is right; one that is
absent, incomplete or damaged is made again. So no lock is needed: processes that share a file write the same bytes to
the same places. It is read by `pread`, as a map of a file that others cut would end the process by a signal.
"""

import contextlib
import errno
import os
import shutil
import threading
import weakref
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import numpy as np

from mlxmm.data.cached_rows import CachedRows
from mlxmm.storage.disk import going_on, naming

NUM_CHECKSUM_BYTES = 4
SUFFIX = ".pixels"  # of the files, so that no other file in their folder is deleted
BLOCK = 512  # bytes, of which st_blocks counts how many a file takes


def num_bytes(num_rows: int, side: int) -> int:
    """What a file of `num_rows` pictures of `side` x `side` pixels takes once it is full."""
    return num_rows * (side * side * 3 + NUM_CHECKSUM_BYTES)


def make_room(folder: Path, needed: Mapping[str, int], max_bytes: int) -> None:
    """Make `folder` ready for files that take `needed` bytes, by name. Others that would make it larger than
    `max_bytes` are deleted, those that were opened longest ago first.

    Raises `OSError` if `needed` is more than `max_bytes`, or what is missing more than half of what the disk has free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    room = max_bytes - sum(needed.values())
    if room < 0:
        raise _no_room(f"{_gib(sum(needed.values()))} would be more than {_gib(max_bytes)}", folder)
    files = {}
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            files[path] = path.stat()
    taken = {path: stat.st_blocks * BLOCK for path, stat in files.items()}
    for path in sorted(files, key=lambda path: files[path].st_mtime, reverse=True):
        if path.name not in needed and (room := room - taken[path]) < 0:
            path.unlink(missing_ok=True)
    missing = sum(max(0, needed[name] - taken.get(folder / name, 0)) for name in needed)
    if missing > (free := shutil.disk_usage(folder).free) / 2:
        raise _no_room(f"{_gib(missing)} would be more than half of the {_gib(free)} that are free", folder)


def _no_room(reason: str, folder: Path) -> OSError:
    return OSError(errno.ENOSPC, reason, str(folder))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2g} GiB"


@attrs.define(eq=False)
class PixelFile:
    """The file of pixels at `path`, which is made if it is missing. Threads may read and write it."""

    path: Path
    side: int  # pixels along the edges of each picture
    _descriptor: int = attrs.field(init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _has_failed: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self):
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._descriptor)  # not before the last thread that reads is done
        os.utime(self.path)

    def read(self, place: int) -> np.ndarray | None:
        """The pixels (side, side, 3) of a row; None if they are not there, or damaged."""
        size = num_bytes(1, self.side)
        try:
            record = memoryview(os.pread(self._descriptor, size, place * size))
        except OSError:  # a disk that does not work
            return None
        pixels, checksum = record[:-NUM_CHECKSUM_BYTES], record[-NUM_CHECKSUM_BYTES:]
        if len(record) < size or checksum != _checksum(pixels, place):
            return None
        return np.frombuffer(pixels, np.uint8).reshape(self.side, self.side, 3)

    def write(self, place: int, pixels: np.ndarray) -> None:
        """Keep the pixels of a row. After a disk has failed, which a line says, no more are written."""
        data = np.ascontiguousarray(pixels)
        with self._lock, going_on("more pixels of decoded pictures"), naming(self.path):
            if not self._has_failed:
                self._has_failed = True
                os.pwritev(self._descriptor, [data, _checksum(data, place)], place * num_bytes(1, self.side))
                self._has_failed = False


def _checksum(pixels: np.ndarray | memoryview, place: int) -> bytes:
    """The CRC-32 of the pixels that belong to a place."""
    return zlib.crc32(pixels, place).to_bytes(NUM_CHECKSUM_BYTES, "little")


@attrs.frozen
class PixelRows(CachedRows):
    """`rows` with their "pixels" (H, W, 3) in place of their images, which are decoded where `file` has no pixels."""

    pixels: Callable[[dict], np.ndarray]  # of a row
    file: PixelFile

    def __getitem__(self, place: int) -> dict:
        if (pixels := self.file.read(place)) is not None:
            return {"pixels": pixels} | self.rows.without_image(place)
        row = self.rows[place]
        pixels = self.pixels(row)
        self.file.write(place, pixels)
        return {"pixels": pixels} | {name: value for name, value in row.items() if name != "image"}
