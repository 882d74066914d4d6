"""A data set of captions without pictures, joined with the pictures of its source by the SHA-256 of their files."""

from collections.abc import Sequence
from typing import Any

import attrs
from PIL import Image

from mlxmm.errors import UserError


@attrs.frozen
class JoinedRows(Sequence):
    """Captions of a data set with the pictures of its source: `Rows` that a Trainer trains on."""

    table: Sequence[dict]
    pictures: Any  # [place] a PIL image, sha256(place)
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> dict:
        image: Image.Image = self.pictures[self.places[place]]
        return {"image": image} | self.without_image(place)

    def without_image(self, place: int) -> dict:
        """The row without its image, which is not decoded."""
        row = self.table[place]
        return {"captions": list(row["caption"]), "id": row["row_id"]}

    def captions(self) -> list[str]:
        """Every caption, without touching an image."""
        return [text for row in self.table for text in row["caption"]]

    def name(self, place: int) -> str:
        """What a person finds the row by."""
        return self.table[place]["row_id"]

    def fingerprint(self) -> bytes:
        """A checksum of the images in their order."""
        return "".join(row["image_sha256"] for row in self.table).encode()


def join_pictures(table: Sequence[dict], pictures) -> JoinedRows:
    """The rows of a data set without pictures, each with the picture of its source that has the same SHA-256.

    `pictures` have a length, `[place]`, a PIL image, and `sha256(place)`, of the picture's file. Raises `UserError`
    that names the first row whose picture is not there.
    """
    place_of = {pictures.sha256(place): place for place in range(len(pictures))}
    if missing := [row["row_id"] for row in table if row["image_sha256"] not in place_of]:
        raise UserError(f"{len(missing)} of {len(table)} pictures are not in the source, first that of {missing[0]}")
    return JoinedRows(table, pictures, [place_of[row["image_sha256"]] for row in table])
