"""CachedRows: the base of rows that have something kept on disk in place of their images."""

from collections.abc import Iterable, Sequence

import attrs

from mlxmm.data.sources.rows import Rows


@attrs.frozen
class CachedRows(Sequence):
    """`rows`, whose captions, names and fingerprint these have too. A subclass gives a row by its place."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict:
        raise NotImplementedError

    def without_image(self, place: int) -> dict:
        return self.rows.without_image(place)

    def captions(self) -> Iterable[str]:
        return self.rows.captions()

    def name(self, place: int) -> str:
        return self.rows.name(place)

    def fingerprint(self) -> bytes:
        return self.rows.fingerprint()
