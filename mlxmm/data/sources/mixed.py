"""MixedRows: the training rows of several sources, one source after the other, as rows of one."""

import hashlib
from collections.abc import Iterator, Sequence

import attrs
import numpy as np

from mlxmm.data.sources.rows import CaptionRows, Rows


@attrs.frozen
class MixedRows(Sequence):
    """The rows at `places[i]` of `parts[i]`, part by part."""

    parts: tuple[Rows, ...]
    places: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.places))

    def __getitem__(self, place: int) -> dict:
        rows, own = self.find(place)
        return rows[own]

    def find(self, place: int) -> tuple[Rows, int]:
        """The part that has the row at `place`, and the row's place there."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        ends = np.cumsum([len(places) for places in self.places])
        part = int(np.searchsorted(ends, place, side="right"))
        own = place - ends[part] + len(self.places[part])
        return self.parts[part], int(self.places[part][own])

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""
        rows, own = self.find(place)
        return rows.without_image(own)

    def captions(self) -> Iterator[str]:
        """Every caption, without touching an image."""
        return (text for place in range(len(self)) for text in self.without_image(place)["captions"])

    def name(self, place: int) -> str:
        """What a person finds the row by, in its source."""
        rows, own = self.find(place)
        return rows.name(own)

    def fingerprint(self) -> bytes:
        """A checksum of the images in their order."""
        digest = hashlib.sha256()
        for rows, places in zip(self.parts, self.places):
            digest.update(rows.fingerprint() + np.asarray(places, dtype=np.int64).tobytes())
        return digest.digest()

    def selected(self) -> list[Rows]:
        """The rows of each part alone."""
        return [_selected(rows, places) for rows, places in zip(self.parts, self.places)]

    def with_first(self, rows: Rows) -> "MixedRows":
        """The mixture with as many other rows in place of those of the first part."""
        return attrs.evolve(self, parts=(rows, *self.parts[1:]))


def _selected(rows: Rows, places: np.ndarray) -> Rows:
    if isinstance(rows, CaptionRows):
        return attrs.evolve(rows, indices=rows.indices[places])
    return rows if len(places) == len(rows) else MixedRows((rows,), (places,))
