"""Training rows with new captions: in place of their own, or of pictures that are added to them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import attrs
import numpy as np
from PIL import Image

from mlxmm.data.pictures import Pictures
from mlxmm.data.sources.rows import Rows


@attrs.frozen
class RecaptionedRows(Sequence):
    """`rows`, of which a fraction `weight` has the new captions of its picture in place of its own.

    Which rows have them is a function of (seed, version, place). A picture without new captions keeps its own.
    """

    rows: Rows
    new: Mapping[int, list[str]]  # captions by place
    weight: float
    seed: int
    version: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict:
        return self._with_captions(self.rows[place], place)

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""
        return self._with_captions(self.rows.without_image(place), place)

    def captions(self) -> Iterable[str]:
        """Every caption, without touching an image."""
        return (text for place in range(len(self)) for text in self.without_image(place)["captions"])

    def name(self, place: int) -> str:
        """What a person finds the row by."""
        return self.rows.name(place)

    def fingerprint(self) -> bytes:
        """That of the pictures, which stay."""
        return self.rows.fingerprint()

    def _with_captions(self, row: dict, place: int) -> dict:
        drawn = np.random.default_rng([self.seed, self.version, place]).random()
        new = self.new.get(place) if drawn < self.weight else None
        return row | {"captions": new} if new else row


@attrs.frozen
class AddedPicture:
    """A picture of `ExtendedRows` that has new captions alone."""

    place: int
    sha256: str
    captions: list[str]


@attrs.frozen
class ExtendedRows(Sequence):
    """`rows`, then those of `pictures` that are `added`."""

    rows: Rows
    pictures: Pictures
    added: Sequence[AddedPicture]

    def __len__(self) -> int:
        return len(self.rows) + len(self.added)

    def __getitem__(self, place: int) -> dict:
        if place < len(self.rows):
            return self.rows[place]
        image: Image.Image = self.pictures[self._added(place).place]
        return {"image": image} | self.without_image(place)

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""
        if place < len(self.rows):
            return self.rows.without_image(place)
        return {"captions": self._added(place).captions, "id": self.name(place)}

    def captions(self) -> Iterable[str]:
        """Every caption, without touching an image."""
        yield from self.rows.captions()
        yield from (text for one in self.added for text in one.captions)

    def name(self, place: int) -> str:
        """What a person finds the row by."""
        return self.rows.name(place) if place < len(self.rows) else self.pictures.name(self._added(place).place)

    def fingerprint(self) -> bytes:
        """A checksum of the images in their order."""
        return hashlib.sha256(self.rows.fingerprint() + "".join(one.sha256 for one in self.added).encode()).digest()

    def _added(self, place: int) -> AddedPicture:
        return self.added[place - len(self.rows)]


def extended(
    rows: Rows, pictures: Pictures, new: Mapping[str, list[str]], places: Mapping[str, int], count: int, seed: Sequence
) -> ExtendedRows:
    """`rows` and at most `count` of `pictures`, drawn from `seed` among those that have captions in `new`.

    `new` and `places` are by the SHA-256 of the pictures.
    """
    known = sorted((places[digest], digest) for digest in new if digest in places)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(known))[:count])
    added = [AddedPicture(place, digest, new[digest]) for place, digest in (known[i] for i in drawn)]
    return ExtendedRows(rows, pictures, added)
