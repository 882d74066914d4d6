"""What the Hub or the network refuses for a moment is tried again as a whole, with longer and longer waits.

huggingface_hub repeats some requests by itself, but not a commit, the creation of a repository, the check of a card,
the look-up of a revision or the body of a file.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from mlxmm.errors import UserError
from mlxmm.terminal import say

WAITS = (1, 2, 4, 8, 16)  # seconds before the second, third, … try
READ_WAITS = WAITS[:3]  # of what is read, which a machine without a network has to report soon
MAX_RETRY_AFTER = 120.0  # seconds that we wait if the Hub asks for it
TRANSIENT = (408, 409, 412, 429)  # and 500 to 599; 409 and 412: somebody else committed meanwhile
DROPPED_CONNECTIONS = {"TransportError", "ConnectionError", "TimeoutError"}  # of httpx, Python, hf_xet

T = TypeVar("T")


def retried(attempt: Callable[[], T], waits: tuple[float, ...]) -> T:
    """What `attempt()` returns, called again after each of `waits` if what failed may pass. Raises its last error."""
    for wait in waits:
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # the client and the network raise a dozen kinds
            if not is_transient(error):
                raise
            wait = max(wait, retry_after(error))
            say(f"the Hub or the network failed ({_short(error)}): trying again in {wait:g} s")
            time.sleep(wait)
    return attempt()


def writing(attempt: Callable[[], T]) -> T:
    """What `attempt()` returns, which writes to the Hub: it must find out by itself what an earlier try has done."""
    return retried(attempt, WAITS)


def reading(attempt: Callable[[], T]) -> T:
    """What `attempt()` returns, which reads from the Hub."""
    return retried(attempt, READ_WAITS)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the Hub said so, or the connection was dropped."""
    for one in causes(error):
        if (code := status(one)) is not None:
            return code in TRANSIENT or code >= 500
    kinds = {kind.__name__ for one in causes(error) for kind in type(one).__mro__}
    return bool(kinds & DROPPED_CONNECTIONS) and "OfflineModeIsEnabled" not in kinds


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors that led to it: a client wraps what the network raised."""
    for _ in itertools.repeat(None, 10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def status(error: BaseException) -> int | None:
    """The HTTP status that an error reports; None if it is of another kind."""
    return getattr(getattr(error, "response", None), "status_code", None)


def retry_after(error: BaseException) -> float:
    """The seconds that the Hub asks to wait; 0 if it does not say."""
    for one in causes(error):
        text = getattr(getattr(one, "response", None), "headers", {}).get("Retry-After", "")
        if text.isdigit():
            return min(float(text), MAX_RETRY_AFTER)
    return 0.0


def _short(error: BaseException) -> str:
    codes = [str(code) for one in causes(error) if (code := status(one)) is not None]
    return f"status {codes[0]}" if codes else type(error).__name__
