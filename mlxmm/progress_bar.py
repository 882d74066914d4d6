"""Progress bars on standard error. This is the only file that imports tqdm."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(
    name: str, total: int, unit: str, items: Iterable | None = None, *, shown: bool = True, **settings
) -> tqdm:
    """tqdm's bar over `items`, or one that is updated by hand; never shown where standard error is no terminal.

    `settings` are tqdm's, for example `delay`: the seconds before the bar is shown at all.
    """
    is_hidden = not (shown and sys.stderr.isatty())
    return tqdm(items, desc=name, total=total, unit=unit, disable=is_hidden, **settings)
