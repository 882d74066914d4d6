"""A child process that answers messages: it may die or hang, and is started again when it is next asked.

It reads messages from its standard input, and writes one answer for each to its standard output, after a first one that
says that it is ready. Its standard error goes to a file without a name, and its last line is reported if it dies.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import mlxmm
from mlxmm.captioners.messages import read_message, write_message

GRACE = 5.0  # seconds for the child to end by itself, once its standard input is closed
MAX_REPORTED = 300  # characters of its last line


def child_command(module: str, folder: Path) -> list[str]:
    """The program that calls `main` of a module of this folder, with `folder` as its argument.

    With -P, and our own packages first, so that no file of the working directory is taken for a package.
    """
    code = f"import sys; sys.path.insert(0, sys.argv.pop(1)); from mlxmm.captioners.{module} import main; main()"
    return [sys.executable, "-P", "-c", code, str(Path(mlxmm.__file__).parents[1]), str(folder)]


class ChildFailed(Exception):
    """The child died, hung, or answered with an error; the message says which, in one line."""


class ChildProcess:
    """The program `command`. Each of its answers, the first one included, may take `timeout` seconds."""

    def __init__(self, command: Sequence[str], timeout: float):
        self.command, self.timeout = list(command), timeout
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process; None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the program, unless it runs, and wait until it is ready. Raises `ChildFailed`."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._errors = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C in the terminal is for the parent, which may want to finish this batch.
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._answer()

    def ask(self, header: dict, blobs: Sequence[bytes] = ()) -> dict:
        """The header of the answer. Raises `ChildFailed`; a child that has died may be started again."""
        return self._answer(header, blobs)

    def close(self) -> None:
        """End the program, if it runs."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._forget()

    def _answer(self, *message) -> dict:
        hung = threading.Event()
        timer = threading.Timer(self.timeout, self._kill_hung, [self._process, hung])
        timer.start()
        try:
            answer = self._exchange(*message)
        except BaseException:  # Ctrl-C: its answer would be taken for that of the next message
            self._process.kill()
            self._forget()
            raise
        finally:
            timer.cancel()
        if answer is None:
            raise ChildFailed(self._how_it_ended(hung.is_set()))
        if "error" in answer:
            raise ChildFailed(answer["error"])
        return answer

    def _exchange(self, *message) -> dict | None:
        """Send `message`, if there is one, and receive the header of the answer; None if no answer comes."""
        try:
            if message:
                write_message(self._process.stdin, *message)
            received = read_message(self._process.stdout)
        except (OSError, ValueError):  # it does not read, or what it writes is no message
            return None
        return received[0] if received else None

    @staticmethod
    def _kill_hung(process: subprocess.Popen, hung: threading.Event) -> None:
        hung.set()
        process.kill()  # ends the wait for its answer

    def _how_it_ended(self, hung: bool) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self._process.kill()
        code, last_line = self._process.wait(), self._last_line()
        self._forget()
        if hung:
            return f"no answer within {self.timeout:g} s"
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{ended}: {last_line}" if last_line else ended

    def _last_line(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, 2) - 4096))
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip()[:MAX_REPORTED] for line in reversed(lines) if line.strip()), "")

    def _forget(self) -> None:
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._errors.close()
        self._process = None
