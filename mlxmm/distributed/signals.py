"""Signals that end a run cleanly: after the current update, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import attrs


class Interrupted(SystemExit):
    """A signal asked the run to end. The exit code is 128 + the signal's number, as shells report it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@attrs.define
class Request:
    """The number of the signal that asked for the end, if one did."""

    number: int | None = None


@contextlib.contextmanager
def end_requests() -> Iterator[Request]:
    """Within the block, SIGINT and SIGTERM are recorded instead of ending the process; a second SIGINT interrupts.

    Handlers that were set before are called too, and restored afterwards. Only the main thread receives signals: in
    any other thread this does nothing.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        if request.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        request.number = number
        if callable(before[number]) and before[number] is not signal.default_int_handler:
            before[number](number, frame)

    try:
        for number in before:
            signal.signal(number, note)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
