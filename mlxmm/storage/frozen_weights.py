"""Frozen weights: the checkpoints of a run share one file of them, by hard links.

That they are the same is found by the fingerprints of their bytes (XXH3 of 128 bits, some 20 GB a second), and not by
which arrays a module holds: an array can be written in place, in MLX and through a view of NumPy's. No array is kept.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import attrs
import mlx.core as mx
import xxhash

from mlxmm.storage.checksums import identity

FROZEN = "frozen.safetensors"


@attrs.frozen(kw_only=True)
class FrozenWeights:
    """What was not trained when a checkpoint was saved, and the file that has it."""

    trained: frozenset[str]  # names of parameters
    fingerprints: dict[str, str]  # of all other parameters
    changing: frozenset[str] = frozenset()  # those of them that changed all the same: running statistics
    file: Path | None = None
    identity: tuple[int, ...] = ()  # of the file, as it was written
    checksum: str = ""

    @classmethod
    def of(
        cls, weights: Mapping[str, mx.array], trained: Iterable[str], earlier: "FrozenWeights | None"
    ) -> "FrozenWeights":
        """What of `weights` is frozen, now that `trained` are not; `earlier` is of the checkpoint before."""
        trained = frozenset(trained)
        fingerprints = {name: fingerprint(array) for name, array in weights.items() if name not in trained}
        if earlier is None or earlier.trained != trained:
            return cls(trained=trained, fingerprints=fingerprints)
        changed = {name for name, now in fingerprints.items() if earlier.fingerprints.get(name, now) != now}
        return cls(trained=trained, fingerprints=fingerprints, changing=earlier.changing | changed)

    @property
    def shared(self) -> dict[str, str]:
        """The fingerprints of what is in the file."""
        return {name: value for name, value in self.fingerprints.items() if name not in self.changing}

    def link(self, path: Path, apart_from: Path | None) -> bool:
        """Make `path` a link to the file, unless the file is not what was written, is `apart_from` too, or the file
        system has no hard links; return whether it was made."""
        try:
            if self.file is None or identity(self.file) != self.identity:
                return False
            if apart_from is not None and apart_from.exists() and apart_from.samefile(self.file):
                return False
            os.link(self.file, path)
        except OSError:
            return False
        return True


def fingerprint(array: mx.array) -> str:
    """A number of 128 bits that arrays share which have the same bytes, shape and dtype."""
    view = memoryview(array)
    value = xxhash.xxh3_128(f"{array.dtype} {array.shape}".encode())
    value.update(view if view.c_contiguous else view.tobytes())
    return value.hexdigest()
