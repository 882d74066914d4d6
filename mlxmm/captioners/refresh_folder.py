"""The folder of a refresh: versions of captions, and which of them each epoch was trained on.

    <folder>/version-3/captions-1-of-1.sqlite   the journal of its captions
    <folder>/version-3/complete.json            the captions that passed, counts; there once all are written
    <folder>/schedule.json                      the version of each epoch, written down before the epoch begins

Version 0 is the captions that the data have.
"""

from pathlib import Path

import attrs

from mlxmm.errors import UserError
from mlxmm.storage.atomic import remove_leftovers, sha256, write_json
from mlxmm.storage.pretrained import read_json

COMPLETE, SCHEDULE = "complete.json", "schedule.json"


@attrs.frozen
class RefreshFolder:
    """Reads and writes the files of a refresh; each is whole or absent."""

    path: Path = attrs.field(converter=Path)

    def version(self, version: int) -> Path:
        """The folder of a version."""
        return self.path / f"version-{version}"

    def newest(self) -> int:
        """The newest version that is complete; 0 if there is none."""
        return max((version for version in self._versions() if self.is_complete(version)), default=0)

    def unfinished(self) -> int:
        """The version that was begun, and is not complete; 0 if there is none."""
        return min((version for version in self._versions() if not self.is_complete(version)), default=0)

    def is_complete(self, version: int) -> bool:
        """Whether all captions of a version are written and judged."""
        return (self.version(version) / COMPLETE).exists()

    def finish(self, version: int, values: dict) -> None:
        """Write what a version is, and that it is complete."""
        write_json(self.version(version) / COMPLETE, values)

    def read(self, version: int) -> dict:
        """What `finish` wrote. Raises `UserError` if it is not there."""
        path = self.version(version) / COMPLETE
        if not path.exists():
            raise UserError(f"{path} is not there, but {self.path / SCHEDULE} says that an epoch was trained on it")
        return read_json(path)

    def digest(self, version: int) -> str:
        """The SHA-256 of what a version is; "" of version 0, and of one that is not there."""
        return sha256(self.version(version) / COMPLETE) if version and self.is_complete(version) else ""

    def trained_on(self) -> list[int]:
        """The versions that epochs were trained on, oldest first."""
        return sorted(set(self._schedule().values()) - {0})

    def scheduled(self, epoch: int) -> int | None:
        """The version that `epoch` is trained on; None if that is open."""
        return self._schedule().get(str(epoch))

    def schedule(self, epoch: int, version: int) -> None:
        """Write down which version `epoch` is trained on."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.scheduled(epoch) != version:
            write_json(self.path / SCHEDULE, self._schedule() | {str(epoch): version})

    def remove_leftovers(self) -> None:
        """Delete the incomplete files that a killed process left."""
        for folder in (self.path, *map(self.version, self._versions())):
            remove_leftovers(folder)

    def _versions(self) -> list[int]:
        return [int(path.name.removeprefix("version-")) for path in self.path.glob("version-*")]

    def _schedule(self) -> dict[str, int]:
        path = self.path / SCHEDULE
        return read_json(path) if path.exists() else {}
