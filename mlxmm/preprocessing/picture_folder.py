"""The files in a folder of pictures: at any depth, without hidden ones; and what of them is left out."""

import os
from collections.abc import Sequence
from pathlib import Path

from mlxmm.preprocessing.images import SUFFIXES
from mlxmm.terminal import counted

# Lists, captions and tables of pictures, and what is packed: nobody takes these for pictures.
BESIDE = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar", ".gz", ".zip", ".arrow", ".npy", ".cls")
MAX_NAMED = 5


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and in its subfolders, sorted, those left away that are hidden or in hidden folders."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def is_picture(path: Path) -> bool:
    """Whether a file is one of those that are read as pictures, by its suffix."""
    return path.suffix.lower() in SUFFIXES


def left_out(paths: Sequence[Path]) -> str | None:
    """The line about the files that are not read as pictures, as .heic and .cr2; None if there are none."""
    others = [path for path in paths if not is_picture(path) and path.suffix.lower() not in BESIDE]
    if not others:
        return None
    more = ", …" if len(others) > MAX_NAMED else ""
    names = ", ".join(str(path) for path in others[:MAX_NAMED])
    return (
        f"left out, {counted(len(others), 'file')} that {'is' if len(others) == 1 else 'are'} not read: {names}{more}"
    )
