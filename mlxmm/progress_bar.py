"""Progress bars: on standard error, or in the notebook. This is the only file that imports tqdm."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec

from tqdm import tqdm


def progress_bar(
    name: str, total: int | None, unit: str, items: Iterable | None = None, *, shown: bool = True, **settings
) -> tqdm:
    """tqdm's bar over `items`, or one that is updated by hand; hidden where nobody would see it move.

    `settings` are tqdm's, for example `delay`: the seconds before the bar is shown at all.
    """
    kind = _bar_of_notebooks() if in_notebook() else tqdm
    return kind(items, desc=name, total=total, unit=unit, disable=not (shown and moves()), **settings)


def moves() -> bool:
    """Whether a bar can be drawn again and again in its place: in a terminal, and in a notebook."""
    return sys.stderr.isatty() or in_notebook()


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
