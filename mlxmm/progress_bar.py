"""Progress bars: on standard error, or in the notebook. This is the only file that imports tqdm.

In a terminal a bar is one line that is drawn again every second, whatever the program waits for. Elsewhere lines are
printed, at most one in `LINE_SECONDS`. No colours are used.
"""

import atexit
import functools
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from importlib.util import find_spec

from tqdm import tqdm

from mlxmm import environment
from mlxmm.terminal import Forgiving, is_terminal

TICK = 1.0  # seconds between drawings
LINE_SECONDS = 10.0
LINE = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"
COUNT_LINE = "{desc}: {n_fmt} after {elapsed}, {rate_fmt}{postfix}"  # where the total is not known
STAGE = "{desc} … {elapsed}"


def progress_bar(
    name: str, total: int | None, unit: str, items: Iterable | None = None, *, shown: bool = True, **settings
) -> tqdm:
    """tqdm's bar over `items`, or one that is updated by hand; plain lines where no bar can be drawn.

    The first of several processes draws. `settings` are tqdm's, for example `leave=False`: nothing stays at the end;
    or `delay`: the seconds before the bar is shown at all.
    """
    disable = not (shown and sys.stderr and environment.is_first_process())
    if in_notebook():
        return _bar_of_notebooks()(items, desc=name, total=total, unit=unit, disable=disable, **settings)
    kind = tqdm if moves() else Lines
    settings = {"dynamic_ncols": True, "file": Forgiving(sys.stderr)} | settings
    bar = kind(items, desc=name, total=total, unit=unit, disable=disable, **settings)
    if not disable:
        _ticker().bars.add(bar)
    return bar


def passing_bar(name: str, total: int | None, unit: str, items: Iterable | None = None, **settings) -> tqdm:
    """A `progress_bar` that leaves nothing behind, and is not shown for what takes less than a second."""
    return progress_bar(name, total, unit, items, **{"leave": False, "delay": 1.0} | settings)


def stage(name: str) -> tqdm:
    """A context that says which stage runs and for how long, where there is nothing to count. Also a decorator's part,
    by `staged`."""
    return progress_bar(name, None, "", bar_format=STAGE, leave=False)


def staged(name: str):
    """A decorator: while the function runs, `stage` says so."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            with stage(name):
                return function(*args, **kwargs)

        return run

    return decorate


def moves() -> bool:
    """Whether a bar can be drawn again and again in its place: in a terminal, and in a notebook."""
    return in_notebook() or is_terminal(sys.stderr)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _bar_of_notebooks() -> type[tqdm]:
    """A widget where ipywidgets is installed. `tqdm.auto` warns where it is not; text does there."""
    if find_spec("ipywidgets") is None:
        return tqdm
    from tqdm.notebook import tqdm as widget

    return widget


class Lines(tqdm):
    """Prints lines in place of a bar: at most one in `LINE_SECONDS` of all bars, and one at the end if it stays."""

    printed = time.monotonic()  # when the newest line of any bar was

    def __init__(self, *args, bar_format: str | None = None, **settings):
        self.opened, total = time.monotonic(), settings.get("total")
        super().__init__(*args, bar_format=bar_format or (LINE if total is not None else COUNT_LINE), **settings)

    def display(self, msg=None, pos=None):
        """Print a line, if it is time, and this has taken a second."""
        if time.monotonic() - Lines.printed >= LINE_SECONDS and time.monotonic() - self.opened >= TICK:
            self._print()

    def close(self):
        """Print the last line, if it is to stay."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
            if self.leave:
                self._print()

    def _print(self) -> None:
        Lines.printed = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()


class Ticker:
    """A thread that draws the bars again while the program waits for something."""

    def __init__(self):
        self.bars: weakref.WeakSet[tqdm] = weakref.WeakSet()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # a daemon that writes while Python ends would break it

    def _run(self) -> None:
        while not self._ended.wait(TICK):
            for bar in list(self.bars):
                if not bar.disable and time.time() >= bar.start_t + bar.delay:
                    bar.refresh()

    def _end(self) -> None:
        self._ended.set()
        self._thread.join(TICK)


@functools.cache
def _ticker() -> Ticker:
    return Ticker()
