"""A mixture: the training rows of several sources, each with its weight, and no picture of the first's val or test."""

from collections.abc import Mapping, Sequence

import numpy as np

from mlxmm.data.loader import Part
from mlxmm.data.pictures import pictures_of
from mlxmm.data.sources.mixed import MixedRows
from mlxmm.data.sources.picture_files import hashes_of
from mlxmm.data.sources.rows import Rows
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.terminal import say


def mix(names: Sequence[str], sources: Sequence[Mapping], weights: Sequence[float], num_threads: int) -> MixedRows:
    """The training rows of all `sources` (rows by split), but for those whose picture is in another split of the first.

    These are reported. A collective call. A source of weight 0 gives no rows; raises `UserError` where another gives
    none.
    """
    held_out = _held_out(sources[0], num_threads) if len(sources) > 1 else set()
    parts, places = tuple(rows["train"] for rows in sources), []
    for number, (name, rows, weight) in enumerate(zip(names, parts, weights, strict=True)):
        own = np.arange(len(rows) if weight else 0)
        if number and weight:
            leaks = _places_of(held_out, rows, num_threads)
            _report(name, names[0], rows, leaks)
            own = np.delete(own, leaks)
        if weight and not Part(len(own), weight).num_drawn:
            raise UserError(f"the weight {weight:g} of {name} gives none of its {len(own)} training rows")
        places.append(own)
    return MixedRows(parts, tuple(places))


def _report(name: str, first: str, rows: Rows, leaks: Sequence[int]) -> None:
    if leaks and collectives.rank() == 0:
        some = ", ".join(map(rows.name, leaks[:5]))
        say(f"left out, as {first} is evaluated on these pictures: {len(leaks)} of {len(rows)} of {name}, as {some}")


def _held_out(splits: Mapping[str, Rows], num_threads: int) -> set[str]:
    """The hashes of the pictures that are not for training."""
    hashes: set[str] = set()
    for split, rows in splits.items():
        if split != "train":
            hashes.update(hashes_of(pictures_of(rows), num_threads))
    return hashes


def _places_of(hashes: set[str], rows: Rows, num_threads: int) -> list[int]:
    """The places of the rows whose pictures have one of these hashes."""
    return [place for place, sha256 in enumerate(hashes_of(pictures_of(rows), num_threads)) if sha256 in hashes]
