"""Join: the tables of a source with captions from elsewhere, each found by the hash or the name of its picture."""

from collections.abc import Sequence

import attrs

from mlxmm.data.sources.caption_tables import NAMES, Entry, PictureIndex, plain_columns
from mlxmm.data.sources.picture_files import hashes_of, sha256_of
from mlxmm.data.sources.tables import Columns, with_columns
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.terminal import say


@attrs.frozen
class Join:
    """Gives tables the captions of `entries`, which are of the tables of captions `names`."""

    entries: Sequence[Entry]
    names: Sequence[str]
    num_threads: int

    def __call__(self, source: str, tables: dict, columns: Columns) -> dict:
        """The rows of `tables` (by split) that have a caption, in the column `columns.caption`, and in others what is
        known of each caption. A collective call.

        Prints how many pictures have none, and how many captions no picture. Raises `UserError` if all have none.
        """
        index, found, num_lost = self._index(tables, columns.image), {}, 0
        for entry in self.entries:
            places = index.find(entry)
            num_lost += 0 if places else len(entry.captions)
            for place in places:
                found.setdefault(place, []).extend(entry.captions)
        found = {place: captions for place, captions in found.items() if captions}
        self._report(source, len(found), sum(map(len, tables.values())), num_lost)
        return {split: _with_captions(table, split, found, columns) for split, table in tables.items()}

    def _index(self, tables: dict, image: str) -> PictureIndex:
        index, by_hash = PictureIndex(), any(entry.sha256 for entry in self.entries)
        for split, table in tables.items():
            pictures = _Cells(table.select_columns([image]), image)
            hashes = hashes_of(pictures, self.num_threads) if by_hash else [None] * len(table)
            named = [name for name in NAMES if name in table.column_names and name != image]
            names = zip(*(table[name] for name in named)) if named else [()] * len(table)
            for row, (sha256, own) in enumerate(zip(hashes, names)):
                path = (pictures.cell(row) or {}).get("path")
                index.add((split, row), [str(name) for name in (path, *own) if name not in (None, "")], sha256)
        return index

    def _report(self, source: str, num_found: int, num_pictures: int, num_lost: int) -> None:
        tables = ", ".join(self.names)
        if not num_found:
            raise UserError(f"no caption of {tables} is of a picture of {source}: compare the names or hashes of both")
        if collectives.rank() == 0:
            left_out = f"; {num_pictures - num_found} are left out" if num_found < num_pictures else ""
            lost = f"; {num_lost} captions are of no picture of it" if num_lost else ""
            say(f"{tables}: captions of {num_found} of {num_pictures} pictures of {source}{left_out}{lost}")


@attrs.frozen
class _Cells:
    """The pictures of a table, as they are hashed."""

    table: Sequence
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def cell(self, place: int) -> dict | None:
        return self.table[place][self.column]

    def sha256(self, place: int) -> str:
        return sha256_of(self.cell(place))


def _with_captions(table, split: str, found: dict, columns: Columns):
    captions = [found.get((split, row), []) for row in range(len(table))]
    beside = plain_columns(captions)
    kept = {name: values for name, values in beside.items() if name not in (columns.image, columns.split)}
    own = {columns.caption: [[one[""] for one in row] for row in captions]}
    return with_columns(table, kept | own).select([row for row, some in enumerate(captions) if some])
