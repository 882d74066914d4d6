"""Signals that end a run in good order: after the update in hand, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import attrs


class Interrupted(SystemExit):
    """A run was asked to end. The exit code is 128 + the signal's number, as a shell reports it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@attrs.define
class Request:
    """Which signal asked for the end, if any did."""

    number: int | None = None


@contextlib.contextmanager
def end_requests() -> Iterator[Request]:
    """Note SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once.

    A handler that was there before is called too, and is put back afterwards. Only the main thread receives
    signals; in any other one this does nothing.
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
