"""Rows of images with captions: what every source keeps, and those of parquet files, image folders and the Hub.

A row is `{"image": PIL, "captions": [str], "id": str}`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import attrs
import numpy as np

from mlxmm.data.sources.arrow_columns import checksum_of
from mlxmm.data.sources.captions import READER
from mlxmm.data.sources.decodable import undecodable_places
from mlxmm.data.sources.picture_column import PictureColumn
from mlxmm.data.sources.tables import Columns, captions_in_row
from mlxmm.data.sources.where import Condition
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import UndecodableImage, decode_image
from mlxmm.storage.remembered import remembered

MAX_UNUSABLE = 0.01  # fraction of a source's rows: with more, something is wrong with it
NUM_TOLERATED = 5  # unusable rows that are left out of any source that has more than twice as many: of 54 one is 2 %
ROWS_AT_ONCE = 1_000  # whose values are Python objects at a time


class Rows(Protocol):
    """The rows of a split, as every source has them: a sequence whose images are decoded when they are asked for.

    Threads call `__getitem__`, so it must not use MLX, whose random key belongs to a thread.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> dict:
        """The row `{"image": PIL, "captions": [str], "id": str}`."""

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""

    def captions(self) -> Iterable[str]:
        """Every caption, without touching an image."""

    def name(self, place: int) -> str:
        """What a person finds the row by."""

    def fingerprint(self) -> bytes:
        """A checksum of the images in their order: what is cached of them is found by it."""


def is_stream(rows) -> bool:
    """Whether rows have neither a length nor numbers, as those of `StreamRows`."""
    return not hasattr(rows, "__len__")


@attrs.frozen(eq=False)
class CaptionColumns:
    """The columns of a table that its captions are read from, and their checksum."""

    table: Any  # a `datasets.Dataset`
    kind: Any  # the feature of the column of captions

    @classmethod
    def of(cls, table, columns: Columns) -> "CaptionColumns":
        """Those that `columns` names."""
        own = table.select_columns(columns.of_captions)
        return cls(own, own.features[columns.caption])

    @cached_property
    def checksum(self) -> bytes:
        """A SHA-256 of all values, and of what they stand for."""
        return hashlib.sha256(checksum_of(self.table) + repr(self.table.features).encode()).digest()


@attrs.frozen
class CaptionRows(Sequence):
    """The rows `indices` of a `datasets.Dataset`, decoded when they are asked for."""

    table: Any  # a `datasets.Dataset`
    indices: np.ndarray
    columns: Columns
    pictures: PictureColumn  # of all rows of the table
    captioned: CaptionColumns  # likewise

    @classmethod
    def of(cls, table, indices: np.ndarray, columns: Columns) -> "CaptionRows":
        """Rows of one table."""
        captioned = CaptionColumns.of(table, columns)
        return cls(table, indices, columns, PictureColumn.of(table, columns.image), captioned)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict:
        index = int(self.indices[place])
        return {
            "image": decode_image(self.pictures[index]),
            "captions": self._captions(self.captioned.table[index], index),
            "id": self.name(place),
        }

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""
        index = int(self.indices[place])
        return {"captions": self._captions(self.captioned.table[index], index), "id": self.name(place)}

    def fingerprint(self) -> bytes:
        """A checksum of the images in their order: of their bytes, or of name, size and time of their files."""
        return hashlib.sha256(self.pictures.identities(self.indices)).digest()

    def checksum(self) -> bytes:
        """A SHA-256 of images and captions in their order, the same wherever their files lie: of files that are named
        alone, their sizes count. It is remembered."""
        key = hashlib.sha256(self.pictures.public_identities(self.indices)).digest() + self._captions_key
        return remembered("checksum", key, self._checksum)

    def _checksum(self) -> bytes:
        digest = hashlib.sha256()
        for index, texts in zip(self.indices.tolist(), self.caption_lists()):
            digest.update(self.pictures.public_identity(index) + json.dumps(texts).encode())
        return digest.digest()

    @property
    def _captions_key(self) -> bytes:
        """What the captions of each row follow from."""
        read = READER, self.columns.caption, self.columns.conditions
        digest = hashlib.sha256(self.captioned.checksum + repr(read).encode())
        digest.update(self.indices.astype(np.int64).tobytes())
        return digest.digest()

    def captions(self) -> list[str]:
        """Every caption, without touching an image."""
        rows = zip(self.indices, self._values(self.columns.of_captions))
        return [text for index, row in rows for text in self._captions(row, index)]

    def caption_lists(self) -> Iterator[list[str]]:
        """The captions of each row; none of a row without."""
        return (self._texts(values) for values in self._values(self.columns.of_captions))

    def cells(self) -> Iterator[dict | None]:
        """The pictures as the table has them: {"bytes", "path"}."""
        return (self.pictures[index] for index in self.indices.tolist())

    def where(self, conditions: Sequence[Condition]) -> tuple["CaptionRows", dict[str, int]]:
        """The rows, and of each the captions, that meet those of `conditions` that are on a column of this table; and
        how many rows each of these left out. Raises `UserError` where a condition does not fit its column."""
        rows, left_out = self, {}
        for condition in conditions:
            if condition.column in self.table.column_names:
                meeting = rows._where(condition.typed(self.table.features[condition.column]))
                left_out[str(condition)] = len(rows) - len(meeting)
                rows = meeting
        return rows, left_out

    def _where(self, condition: Condition) -> "CaptionRows":
        columns = attrs.evolve(self.columns, conditions=(*self.columns.conditions, condition))
        kept = [columns.keep(values) for values in self._values(columns.of_captions)]
        captioned = CaptionColumns.of(self.table, columns)
        indices = self.indices[np.array(kept, dtype=bool)]
        return attrs.evolve(self, columns=columns, captioned=captioned, indices=indices)

    def caption_facts(self, columns: Sequence[str]) -> Counter:
        """How many captions have each combination of values in `columns`; empty if there is no such column."""
        facts: Counter = Counter()
        for values in self._values([*self.columns.of_captions, *columns]) if self._has(columns) else ():
            met = self.columns.met(values)
            cells = (values[name] if isinstance(values[name], list) else [values[name]] * len(met) for name in columns)
            facts.update(fact for fact, is_met in zip(zip(*cells), met) if is_met)
        return facts

    def _has(self, columns: Sequence[str]) -> bool:
        return set(columns) <= set(self.table.column_names)

    def _values(self, columns: Sequence[str]) -> Iterator[dict]:
        """The values in `columns`, row by row."""
        names = list(dict.fromkeys(columns))
        table = self.table.select_columns(names).select(self.indices)
        for start in range(0, len(table), ROWS_AT_ONCE):
            some = table[start : start + ROWS_AT_ONCE]
            yield from (dict(zip(names, row)) for row in zip(*(some[name] for name in names)))

    def first_of_each(self, column: str) -> "CaptionRows":
        """The first row of each value of `column`. Raises `UserError` if there is no such column."""
        if column not in self.table.column_names:
            raise UserError(f"there is no column {column!r}; the columns are {', '.join(self.table.column_names)}")
        places: dict = {}
        for place, value in enumerate(self.table.select_columns([column]).select(self.indices)[column]):
            if isinstance(value, list | dict):
                raise UserError(f"column {column!r} must hold classes; it holds {value!r:.60}")
            places.setdefault(value, place)
        return attrs.evolve(self, indices=self.indices[list(places.values())])

    def _captions(self, values: dict, index: int) -> list[str]:
        if texts := self._texts(values):
            return texts
        raise UserError(f"row {index} has no caption")

    def _texts(self, values: dict) -> list[str]:
        return captions_in_row(values, self.columns, self.captioned.kind)

    def name(self, place: int) -> str:
        """What a person finds the row by: its file, if it has one, and its number."""
        index = int(self.indices[place])
        path = self.pictures.paths[index]
        return f"{path} (row {index})" if path else f"row {index}"

    def without_undecodable(self, num_threads: int) -> tuple["CaptionRows", list[str]]:
        """The rows whose images can be decoded, and the names of the others. A collective call."""
        return self._without(undecodable_places(self, num_threads), self.name_of_broken)

    def without_captionless(self) -> tuple["CaptionRows", list[str]]:
        """The rows that have a caption, and the names of the others."""
        places = np.frombuffer(remembered("captionless", self._captions_key, self._captionless), np.int64)
        return self._without(places.tolist())

    def _captionless(self) -> bytes:
        places = [place for place, texts in enumerate(self.caption_lists()) if not texts]
        return np.array(places, np.int64).tobytes()

    def _without(self, places: Sequence[int], name=None) -> tuple["CaptionRows", list[str]]:
        return attrs.evolve(self, indices=np.delete(self.indices, places)), list(map(name or self.name, places))

    def name_of_broken(self, place: int) -> str:
        """The name of a row whose picture cannot be decoded, and whether that is because its file is not there."""
        image = self.pictures[int(self.indices[place])] or {}
        is_absent = image.get("path") and image.get("bytes") is None and not os.path.exists(image["path"])
        return f"{self.name(place)}, no such file" if is_absent else self.name(place)

    def is_decodable(self, place: int) -> bool:
        """Whether the image at `place` can be decoded."""
        try:
            decode_image(self.pictures[int(self.indices[place])])
            return True
        except UndecodableImage:
            return False
