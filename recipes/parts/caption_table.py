"""The table of captions that `caption` writes: its folder is made, and training reads the names of its pictures.

file_name,caption        with .csv; with .jsonl an object on each line
"""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import attrs

from mlxmm.data.sources.caption_tables import text_rows
from mlxmm.errors import UserError
from mlxmm.storage.atomic import write_text

COLUMNS = ("file_name", "caption")


@attrs.define
class CaptionTable:
    """The captions of files, by the names that the table gives these."""

    path: Path
    captions: dict[str, str] = attrs.field(factory=dict)
    num_added: int = attrs.field(default=0, init=False)

    @classmethod
    def open(cls, path: Path) -> "CaptionTable":
        """A new table, whose folder is made; or the one that is there. Raises `UserError` if it cannot be written."""
        table = cls(path, _read(path) if path.exists() else {})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be made: {error.strerror}") from None
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path.parent} cannot be written to: name another folder")
        return table

    def __contains__(self, picture: Path) -> bool:
        return self._name(picture) in self.captions

    def add(self, picture: Path, caption: str) -> None:
        """The caption of a file."""
        self.captions[self._name(picture)] = caption.strip()
        self.num_added += 1

    def write(self) -> None:
        """Write the table, if it has a new caption."""
        if self.num_added:
            write_text(self.path, _text_of(self.captions, self.path.suffix))

    def _name(self, picture: Path) -> str:
        r"""A file's path below the folder of the table, which is how metadata name it; that of another as it is. Bytes
        that are no text, which a table cannot hold, are named as `\udcff`."""
        folder, path = os.path.abspath(self.path.parent), os.path.abspath(picture)
        name = Path(path).relative_to(folder).as_posix() if Path(path).is_relative_to(folder) else str(picture)
        return name.encode(errors="backslashreplace").decode()


def _read(path: Path) -> dict[str, str]:
    rows = text_rows(path)
    if any(set(row) != set(COLUMNS) for row in rows):
        raise UserError(f"{path} is no table of `caption`: it has other columns than {' and '.join(COLUMNS)}")
    return {row["file_name"]: row["caption"] for row in rows}


def _text_of(captions: Mapping[str, str], suffix: str) -> str:
    rows = [dict(zip(COLUMNS, row)) for row in captions.items()]
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
