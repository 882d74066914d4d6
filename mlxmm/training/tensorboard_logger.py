"""TensorBoardLogger: TensorBoard's event files."""

import atexit
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlxmm.escaping import visible
from mlxmm.training.logger import Logger, flat_params, set_aside

PREFIX = "events.out.tfevents."  # of the files' names: then come the time, the host and a number
# TensorBoard sorts tags by name. These say how a run went, not what it reached: they come last, after "val/…".
VITALS = ("epoch", "lr", "memory", "refresh", "schedule", "throughput")


class TensorBoardLogger(Logger):
    """TensorBoard's event files in `folder`: scalars, images, text, histograms, embeddings, hyper-parameters.

    Tags are the names of metrics, but "vitals/lr" for "lr", and so on for the first words in `VITALS`.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._writer: Any = None  # of tensorboardX
        self._purge_step = None
        self._own: set[Path] = set()  # files that this logger began
        self._has_run = False
        self._start = None  # the settings, which are written with the first of the rest
        self._end = None  # what says that the run whose settings were written is over
        self._is_broken = False  # the file that is open did not take all

    @property
    def writer(self):
        """The tensorboardX writer, created at the first write, so that no empty file is left."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            earlier = self._files()
            # Names tell the second alone: without a number, a test right after `fit` would overwrite its file.
            number = f".{max(map(_number, earlier), default=-1) + 1:03}"
            self._writer = SummaryWriter(str(self.folder), purge_step=self._purge_step, filename_suffix=number)
            self._purge_step = None  # a later file, of a test, must not hide what this one gets
            self._own |= {_put_last(path, earlier) for path in self._files() - earlier}
            self._protect(self._writer.file_writer.event_writer._ev_writer._py_recordio_writer)
            if self._start is not None:
                self._writer.file_writer.add_summary(self._start)
                self._start = None
        return self._writer

    @property
    def experiment(self):
        """Lightning's name of `writer`."""
        return self.writer

    def _protect(self, records) -> None:
        """Let the thread that writes drop what the disk does not take: else it dies, and the run waits for it.

        Its file is not written any more, as the next record would follow a part of one.
        """
        for name in ("write", "flush", "close"):
            setattr(records, name, functools.partial(self._write, getattr(records, name)))

    def _write(self, write: Callable, *data: bytes) -> None:
        if self._is_broken:
            return
        try:
            write(*data)
        except OSError as error:
            self._is_broken = True
            self.drop(error)

    def _files(self) -> set[Path]:
        return set(self.folder.glob(f"{PREFIX}*"))

    def begin(self):
        is_evaluated = (self.folder / "metrics.jsonl").exists()  # of a run before, this log is set aside by now
        if self._has_run or (self._files() - self._own and not is_evaluated):
            set_aside(self.folder, f"{PREFIX}*")

    def log_metrics(self, metrics, step, epoch):
        self._has_run |= step > 0
        for name, value in {**metrics, "epoch": epoch}.items():
            self.writer.add_scalar(_tag(name), value, step)

    def log_hyperparams(self, params):
        from tensorboardX.summary import hparams

        # `add_hparams` would open a second run beside this one. The first summary names the columns of the table:
        # without it, TensorBoard takes the settings and metrics of all runs that it shows.
        _, self._start, self._end = hparams(dict(flat_params(params)), {})

    def log_images(self, name, images, step):
        self.writer.add_images(_tag(name), images, step, dataformats="NHWC")

    def log_text(self, name, text, step):
        self.writer.add_text(_tag(name), text, step)

    def log_histogram(self, name, values, step):
        finite = values[np.isfinite(values)]
        if finite.size:
            self.writer.add_histogram(_tag(name), finite, step)

    def log_embedding(self, name, vectors, columns, rows, images, step):
        if (self.folder / f"{step:05}" / name).exists():  # written before the run was resumed
            return
        pixels = images.transpose(0, 3, 1, 2) / 255
        self.writer.add_embedding(vectors, [list(map(visible, row)) for row in rows], pixels, step, name, list(columns))

    def flush(self):
        if self._writer is not None:
            self._writer.flush()
        if self._is_broken:  # the disk may have room by now: what comes next goes into a file of its own
            self._close()

    def finalize(self, status):
        if self._writer is None:
            return
        if status == "success" and self._end is not None:
            self._writer.file_writer.add_summary(self._end)
        self._close()
        self._end = None

    def _close(self) -> None:
        cleanup = _CleanupOf(self._writer.file_writer)
        self._writer.close()
        atexit.unregister(cleanup)
        self._writer, self._is_broken = None, False

    def rewind(self, position, step):
        self._has_run = True
        self._purge_step = step + 1  # from this step on, TensorBoard hides what older files hold


class _CleanupOf:
    """Equal to the function that closes a `FileWriter` of tensorboardX again when Python ends, and keeps all of it
    until then: it is a closure, of which `atexit` alone knows."""

    def __init__(self, file_writer: Any):
        self._file_writer = file_writer

    def __eq__(self, function: object) -> bool:
        name, cells = getattr(function, "__qualname__", ""), getattr(function, "__closure__", None)
        return name == "FileWriter.__init__.<locals>.cleanup" and cells[0].cell_contents is self._file_writer


def _tag(name: str) -> str:
    return f"vitals/{name}" if name.split("/")[0] in VITALS else name


def _number(path: Path) -> int:
    """The number at the end of a file's name; -1 if it has none."""
    return int(path.suffix[1:]) if path.suffix[1:].isdigit() else -1


def _second(path: Path) -> int:
    """The time in a file's name, in seconds."""
    return int(re.match(r"\d*", path.name.removeprefix(PREFIX))[0] or 0)


def _put_last(path: Path, earlier: set[Path]) -> Path:
    """Rename a file so that it is read after `earlier` ones, also where the clock was put back: TensorBoard reads in
    the order of names, and would take what it reads last for the newest."""
    newest = max(map(_second, earlier), default=0)
    if _second(path) > newest:
        return path
    return path.rename(path.with_name(path.name.replace(str(_second(path)), str(newest + 1), 1)))
