"""What a program tells while it works. A pipe that was closed, a full disk or a lost terminal never ends the work."""

import contextlib
import errno
import os
import signal
import sys
from typing import Any, NoReturn

from mlxmm.escaping import visible

# Ctrl-C; `kill`, and a scheduler at the end; a terminal that is gone; Slurm's warning (--signal=USR1@60).
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def end_at_signals() -> None:
    """From now on the signals `ENDS` end this process with one line: for the time of imports, which would show a
    traceback, or nothing."""
    for number in ENDS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_of_imports)


def open_streams() -> None:
    """Give this process the standard streams that it was started without: else a file that it opens gets the number of
    one, and MLX opens no file as number 0. Letters that the locale has not are written as escapes."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
            with contextlib.suppress(OSError):  # whatever has the number keeps it
                os.set_inheritable(number, True)
        elif name != "stdin" and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def end_of_imports(number, frame) -> None:
    """The handler of a signal that comes while Python imports."""
    end_at_once("interrupted: nothing was begun", 128 + number)


def end_at_once(line: str, code: int) -> NoReturn:
    """End this process with a line, if anyone can read it."""
    stream = Forgiving(sys.stderr)
    stream.write(f"{line}\n")
    stream.flush()
    os._exit(code)


def say(*lines: str) -> None:
    """Print lines on standard output, as long as anyone can read it. What acts on a terminal is shown instead."""
    text = "\n".join(map(visible, lines))
    try:
        print(_encodable(text, sys.stdout), flush=True)
    except (OSError, ValueError) as error:  # ValueError: it was closed
        discard(sys.stdout)
        if getattr(error, "errno", errno.EPIPE) not in (errno.EPIPE, errno.EIO):
            print(f"warning: standard output cannot be written, the run goes on: {error}", file=Forgiving(sys.stderr))


def counted(number: int, noun: str) -> str:
    """A number with its noun, as "1 picture" or "2,000 pictures"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _encodable(text: str, stream) -> str:
    """`text` as `stream` can write it: in ASCII, as after LANG=C, other letters become escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Forgiving:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        """Write `text`, or drop it."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            discard(self._stream)

    def flush(self) -> None:
        """Flush the stream, or drop what it holds."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            discard(self._stream)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def discard(stream) -> None:
    """Send what is written to `stream` from now on nowhere: Python flushes what it still holds at the end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # not a file, closed, or none at all
        pass


def is_terminal(stream) -> bool:
    """Whether a line on `stream` can be drawn again in its place: a terminal that is not 0 wide."""
    if stream is None or not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # it does not tell
        return True
