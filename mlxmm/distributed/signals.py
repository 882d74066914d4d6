"""Signals that end a run cleanly: after the current update or batch, with a checkpoint."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import attrs

from mlxmm.terminal import ENDS, end_at_once, end_of_imports

NO_KERNEL = "Could not load C++ shared library"  # MLX, of what a compiler did not write


class Ended(SystemExit):
    """A signal ends the program. The exit code is 128 + the signal's number, as shells report it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Interrupted(Ended):
    """A signal asked a run to end, which does so between two updates or batches: its checkpoint can be saved."""


@attrs.define
class Request:
    """The number of the signal that asked for the end, if one did."""

    number: int | None = None

    def check(self) -> None:
        """Raise `Interrupted` if a signal asked for the end: for loops that may be left between two batches."""
        if self.number is not None:
            raise Interrupted(self.number)


_current = Request()


def check_end() -> None:
    """Raise `Interrupted` where a signal asked a lone process to end. Between batches, of whatever takes long."""
    _current.check()


@contextlib.contextmanager
def end_requests(alone: bool = True, ending: contextlib.ExitStack | None = None) -> Iterator[Request]:
    """Within the block, the signals `ENDS` are recorded instead of ending the process; a second SIGINT interrupts.

    `check_end` heeds them if this process is `alone`: others must agree first. Ctrl-C in a terminal ends the compiler
    too that MLX may be calling: its failure is the signal then, not an error. Handlers that were set before are called
    too, and restored afterwards: once `ending` is over where `Interrupted` leaves the block, so that a second signal
    does not end the last checkpoint. Signals that are ignored stay so (`nohup`). Only the main thread receives signals:
    in any other thread this does nothing.
    """
    global _current
    request, outer = Request(), _current
    before = _handlers()

    def note(number, frame):
        if request.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        request.number = number
        if callable(before[number]) and before[number] not in (signal.default_int_handler, _raise):
            before[number](number, frame)

    _current = request if alone else outer
    with contextlib.ExitStack() as handlers:
        handlers.enter_context(_handled(before, note))
        try:
            with _compiler_ended_too():
                yield request
        except Interrupted:
            if ending is not None:
                ending.push(handlers.pop_all())
            raise
        finally:
            _current = outer


@contextlib.contextmanager
def _compiler_ended_too() -> Iterator[None]:
    """Within the block, the failure of a compiler that a signal has ended raises `Interrupted`."""
    try:
        yield
    except RuntimeError as error:
        if NO_KERNEL in str(error):
            _current.check()
        raise


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within the block, the signals `ENDS` raise an exception: `KeyboardInterrupt` or `Ended`.

    Those that come while the program ends already raise none: its reason, or what it kept, can be told. Ctrl-C then
    ends it at once.
    """
    before = {number: signal.SIG_DFL if old is end_of_imports else old for number, old in _handlers().items()}
    with _handled(before, _raise):
        yield


def _raise(number, frame) -> None:
    if not isinstance(sys.exception(), KeyboardInterrupt | SystemExit):
        raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)
    if number == signal.SIGINT:
        end_at_once("interrupted again: ended at once", 128 + number)


def _handlers() -> dict[int, Callable | int | None]:
    """The handlers of the signals that this thread may handle."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: now for number in ENDS if (now := signal.getsignal(number)) is not signal.SIG_IGN}


@contextlib.contextmanager
def _handled(before: dict, handler: Callable) -> Iterator[None]:
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
