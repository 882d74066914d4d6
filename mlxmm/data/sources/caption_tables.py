"""Captions in tables of their own, and the pictures that they are of.

A table has a row for each picture or for each caption. It is a .parquet, .jsonl, .json, .csv or .tsv file (the last
four also .gz), or a data set of captions without pictures, as `write_captions` makes it: a folder, or a Hub id. A row
names its picture by the SHA-256 of its file (image_sha256), or by a name, with or without folders and suffix.
"""

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import attrs

from mlxmm.data.sources.captions import captions_at, cells_at, texts_in, value_at
from mlxmm.errors import UserError
from mlxmm.storage import json_values
from mlxmm.storage.disk import require_file

HASH = "image_sha256"
NAMES = (
    "file_name",
    "filename",
    "item_key",
    "__key__",
    "filepath",
    "id",
    "url",
    "media",
)  # columns that name a picture
CAPTIONS = ("caption", "captions", "rollout_results", "metadata.rollout_results", "text")  # where none is asked for
CAPTIONER = ("captioner", "captioner_revision", "quantization")  # columns that `mlxmm/export/dataset.py` writes
WRITERS = ("captioner", "model", "model_name", "metadata.model", "contributor_id")  # columns that name a captioner
TEXT_FILES = (".jsonl", ".json", ".csv", ".tsv")
MAX_PARTS = 4  # of a path, by which a picture may be named
NOT_UTF8 = "{} is not a text in UTF-8: save it in that encoding"
PLAIN = (str, bool, int, float)


@attrs.frozen
class Entry:
    """The captions in one row of a table: each with the values of the other columns; and what names their picture."""

    sha256: str | None
    names: tuple[str, ...]
    captions: tuple[dict, ...]


def entries_of(name: str, rows: Iterable[dict], caption_column: str) -> list[Entry]:
    """The entries of the table `name`. Raises `UserError` if it has no captions, or names no pictures."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows[:1_000] for column in row))
    wanted = dict.fromkeys([caption_column, *CAPTIONS])
    column = next((one for one in wanted if any(captions_at(row, one) for row in rows)), None)
    if column is None:
        raise UserError(f"{name} has no captions in {', '.join(wanted)}; it has {', '.join(columns) or 'no rows'}")
    if not {HASH, *NAMES} & set(columns):
        raise UserError(f"{name} does not say which pictures its captions are of: it needs {HASH} or one of {NAMES}")
    return [_entry(row, column) for row in rows]


def _entry(row: dict, column: str) -> Entry:
    cells, beside = cells_at(row, column), {column, HASH, *NAMES}
    writer = next((value for one in WRITERS if (value := value_at(row, one))), None)
    facts = {name: value for name, value in row.items() if name not in beside}
    facts |= dict.fromkeys(CAPTIONER) | {"captioner": writer} | facts if writer else {}
    captions = [
        {"": text} | {name: _of_caption(value, place, len(cells)) for name, value in facts.items()}
        for place, cell in enumerate(cells)
        for text in texts_in(cell)
    ]
    return Entry(row.get(HASH), tuple(_names(row)), tuple(captions))


def _of_caption(value, place: int, num_captions: int):
    """A column's value for one of a row's captions: columns of `write_captions` hold one for each."""
    value = value[place] if isinstance(value, list) and len(value) == num_captions else value
    return value if isinstance(value, PLAIN) else None


def _names(row: Mapping) -> Iterable[str]:
    for column in NAMES:
        value = row.get(column)
        media = value if isinstance(value, list) else []
        found = [one.get(key) for one in media if isinstance(one, dict) for key in ("path", "url", "id")]
        yield from (str(one) for one in found or [value] if isinstance(one, str | int) and str(one))


class PictureIndex:
    """Where pictures are, by the hashes of their files and by the ends of their paths, with and without suffix."""

    def __init__(self):
        self.by_hash: dict[str, list] = defaultdict(list)
        self.by_name: dict[str, list] = defaultdict(list)

    def add(self, place: Any, names: Iterable[str], sha256: str | None = None) -> None:
        """The picture at `place`."""
        if sha256:
            self.by_hash[sha256].append(place)
        for key in {key for name in names for key in _keys(name)}:
            self.by_name[key].append(place)

    def find(self, entry: Entry) -> list:
        """The places of the pictures of an entry: all with its hash, else the one with the longest name in common.

        Raises `UserError` where a name is that of several pictures.
        """
        if entry.sha256:
            return self.by_hash.get(entry.sha256, [])
        for key in (key for name in entry.names for key in _keys(name)):
            if len(places := self.by_name.get(key, [])) > 1:
                raise UserError(
                    f"the captions of {key!r} may be of {len(places)} pictures: name them with their folders"
                )
            if places:
                return places
        return []


def _keys(name: str) -> list[str]:
    """The last parts of a path or URL, longest first; then the same without the suffix."""
    path = unquote(urlsplit(name).path) if "://" in name else name
    parts = PurePosixPath(path.replace("\\", "/")).parts[-MAX_PARTS:]
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    return list(dict.fromkeys([*ends, *(str(PurePosixPath(end).with_suffix("")) for end in ends if end != "/")]))


def plain_columns(captions: Sequence[Sequence[dict]]) -> dict[str, list[list]]:
    """The columns beside the captions of each picture: those whose values are of one kind, and not all missing."""
    names = dict.fromkeys(name for row in captions for one in row for name in one if name)
    columns = {name: [[one.get(name) for one in row] for row in captions] for name in names}
    kinds = {name: {type(v) for row in rows for v in row if v is not None} for name, rows in columns.items()}
    return {
        name: rows for name, rows in columns.items() if len(kinds[name]) == 1 or name in CAPTIONER and not kinds[name]
    }


def is_text_table(name: str) -> bool:
    """Whether this is the path of a table that `text_rows` reads."""
    return name.removesuffix(".gz").endswith(TEXT_FILES)


def text_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl, .json, .csv or .tsv file, which may be compressed. Raises `UserError`."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        require_file(path)
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == ".jsonl":
                rows = [json_values.loads(line) for line in file if line.strip()]
            else:
                rows = _json_rows(json_values.loads(file.read())) if kind == ".json" else csv_rows(file.read())
        if kind in (".jsonl", ".json"):
            json.dumps(rows, ensure_ascii=False).encode()  # half a letter may stand in JSON, and in no column
    except UnicodeError:
        raise UserError(NOT_UTF8.format(path)) from None
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{path} must hold an object for each row, as {{"file_name": "1.jpg", "caption": "a cat"}}')
    return rows


def _json_rows(values) -> list:
    """A list of rows, or an object with captions by the names of the pictures."""
    if isinstance(values, dict):
        return [{"file_name": name, "caption": captions} for name, captions in values.items()]
    return values if isinstance(values, list) else [values]


def csv_rows(text: str) -> list[dict]:
    """The rows of a CSV or TSV file with a header: what stands between the columns is in the header."""
    header = text.partition("\n")[0]
    delimiter = max("\t,;|", key=header.count)
    return list(csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, skipinitialspace=True))
