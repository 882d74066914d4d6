"""What is a user's to put right: exceptions, several of them as one, and warnings that point to the user's line."""

import contextlib
import functools
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlxmm.escaping import visible
from mlxmm.terminal import Forgiving

PACKAGE = Path(__file__).parent


class UserError(ValueError):
    """What the person at the keyboard can put right. Recipes print it on one line and exit with 2."""

    faults: list[str]  # the lines of an error that tells of several


class BackendError(ImportError):
    """MLX is there, but not the backend that it computes with; the message says what to install."""


class Faults(list[str]):
    """Faults that are found one after another and told together.

    with faults.noted(): one_check()
    with faults.noted(): another()
    faults.refuse()
    """

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within the block, a `UserError` is noted instead of raised."""
        try:
            yield
        except UserError as error:
            self += getattr(error, "faults", [str(error)])

    def refuse(self, also: Iterable[str] = (), kind: type[UserError] = UserError) -> None:
        """Raise one error of all that was noted, if anything was. `also` is likely, and alone no reason to refuse."""
        if not self:
            return
        faults = list(dict.fromkeys([*self, *also]))
        error = kind(as_one(faults))
        error.faults = faults
        raise error


def as_one(faults: list[str]) -> str:
    """The text of an error that tells of these faults."""
    many = [f"{len(faults)} things to put right:", *(f"- {fault}" for fault in faults)]
    return "\n".join(many) if len(faults) > 1 else faults[0]


def warn(told: str) -> None:
    """Warn at the line of the user's program that led here: not at ours, MLX's, or that of a context manager. A
    recipe's own program has none, and prints a line."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_code.co_filename.startswith(_others_files()):
        frame, level = frame.f_back, level + 1
    if frame is None:
        _print_once(f"warning: {visible(told)}")
    else:
        warnings.warn(visible(told), stacklevel=level)


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=Forgiving(sys.stderr))


@functools.cache
def _others_files() -> tuple[str, ...]:
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib", "scripts")]
    folders = [PACKAGE, (PACKAGE / "callbacks").resolve(), *installed]
    return *(f"{folder}/" for folder in folders), "<attrs", "<frozen"
