"""Logger: what a Trainer and its callbacks write metrics, images, texts and distributions to."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np

from mlxmm.escaping import markdown
from mlxmm.storage.disk import is_of_the_machine, reason
from mlxmm.terminal import say
from mlxmm.training import lightning_arguments, lightning_words, unknown_names

WRITERS = {"log_metrics", "log_hyperparams", "log_images", "log_text", "log_table", "log_histogram", "log_embedding"}
WRITERS |= {"flush", "finalize"}
MEASURED = ("throughput/", "memory/")  # prefixes of what the machine did, which no other run repeats


class Logger(metaclass=lightning_arguments.AnswersArguments):
    """What a `Trainer` writes to. `metrics` maps names to Python floats.

    A disk that is full costs what was to be written, and not the run: the first time a line says so.
    """

    _has_failed = False

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in WRITERS & vars(cls).keys():
            setattr(cls, name, _going_on(vars(cls)[name]))

    def __init__(self) -> None:
        """Takes nothing: the arguments of `object` are anything."""

    def __getattr__(self, name: str):
        """For names of Lightning's, what to write instead."""
        if name in lightning_words.LOGGER:
            raise unknown_names.missing(type(self).__name__, name, lightning_words.LOGGER)
        return super().__getattribute__(name)

    def log_metrics(self, metrics: dict[str, float], step: int, epoch: int) -> None:
        """Write scalars; `step` counts updates."""

    def log_hyperparams(self, params: dict) -> None:
        """Write the settings of a run, a nested dict."""

    def log_images(self, name: str, images: np.ndarray, step: int) -> None:
        """Write images (N, H, W, 3), uint8."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Write Markdown."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence], step: int) -> None:
        """Write a table; by default as Markdown."""
        self.log_text(name, markdown_table(columns, rows), step)

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Write how the finite ones of `values`, of any shape, are distributed."""

    def log_embedding(
        self, name: str, vectors: np.ndarray, columns: Sequence[str], rows: Sequence[Sequence], images, step: int
    ) -> None:
        """Write vectors (N, D) to be looked at in two or three dimensions, with a row of labels and an image each.

        `images` is (N, H, H, 3), uint8.
        """

    def drop(self, error: OSError) -> None:
        """Go on without what a disk did not take: the first time a line says so. Raises any other `error`."""
        if not is_of_the_machine(error):
            raise error
        if not self._has_failed:
            say(f"warning: {type(self).__name__} cannot write, the run goes on: {reason(error)}")
        self._has_failed = True

    def flush(self) -> None:
        """Write everything to disk: a checkpoint is about to be saved."""

    def finalize(self, status: str) -> None:
        """The run has ended; `status` is "success" or "failed"."""

    def begin(self) -> None:
        """A run begins at step 0: the files of another one, which it would be mixed with, are set aside."""

    def position(self) -> int:
        """The size of the logger's file, in bytes."""
        return 0

    def rewind(self, position: int | None, step: int) -> None:
        """Discard what was written after `position`, at which `step` updates were done: a run resumes there.

        None: the checkpoint does not know this logger, and the step has to do.
        """


def _going_on(write: Callable) -> Callable:
    """A method of a logger that drops what the disk does not take."""

    @functools.wraps(write)
    def method(self, *args, **settings):
        try:
            return write(self, *args, **settings)
        except OSError as error:
            self.drop(error)

    return method


def set_aside(folder: Path, pattern: str) -> None:
    """Move the files of an earlier run's log into a folder of their own, `earlier_0` and so on."""
    files = sorted(folder.glob(pattern))
    own = next(path for n in count() if not any((path := folder / f"earlier_{n}").glob(pattern)))
    own.mkdir(exist_ok=True)
    for path in files:
        path.rename(own / path.name)


def repeatable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a second run with the same settings has too: not how fast it was, nor its memory."""
    return {name: value for name, value in metrics.items() if not name.startswith(MEASURED)}


def flat_params(params: Mapping, prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Nested settings by their dotted names, as values that tables of hyper-parameters show."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from flat_params(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield prefix + name, ", ".join(map(str, value))
        else:
            yield prefix + name, value if isinstance(value, bool | int | float | str) else str(value)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown. Texts of several lines become one, and nothing in them acts."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(markdown, line))} |" for line in lines)
