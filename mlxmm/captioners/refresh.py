"""New captions for training pictures while training goes on: version by version, each kept in the run's folder.

    <folder>/version-3/captions-1-of-1.sqlite   the journal of its captions
    <folder>/version-3/complete.json            counts; there once all are written
    <folder>/schedule.json                      which version each epoch was trained on

Version 0 is the captions that the data have. Which version an epoch was trained on is written down before the epoch
begins, so that a resumed run trains on the same ones, however long writing takes the second time.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np
from attrs.validators import ge, le

from mlxmm.captioners.caption_writer import CaptionWriter, Sampling
from mlxmm.captioners.job import Shard, hashes_of, journal_name, requests, write_captions
from mlxmm.captioners.journal import Entry, Journal
from mlxmm.data.pictures import pictures_of
from mlxmm.data.sources.rows import Rows
from mlxmm.storage.atomic import write_json
from mlxmm.storage.pretrained import read_json

COMPLETE, SCHEDULE = "complete.json", "schedule.json"
Keep = Callable[[Sequence[Entry]], Iterable[bool]]


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


@attrs.define
class CaptionRefresh:
    """The rows of each epoch, for `SyntheticRefresh(CaptionRefresh(...))`: from epoch `every_n_epochs` on, with new
    captions of the pictures of `rows`.

    A new version is begun every `every_n_epochs` epochs, with a seed of its own. A writer that computes in this process
    (`in_process`) writes it between two epochs; any other in a thread, and the first epoch after it is complete has it.
    A writer that fails never stops training: `metrics` say so, and it is asked again. `keep` tells which
    captions pass the filters.
    """

    folder: Path = attrs.field(converter=Path)
    rows: Rows
    writer: CaptionWriter
    prompts: Mapping[str, str]
    sampling: Sampling = Sampling(temperature=1.0)
    weight: float = attrs.field(default=0.5, validator=[ge(0), le(1)], kw_only=True)
    every_n_epochs: int = attrs.field(default=1, validator=ge(1), kw_only=True)
    keep: Keep | None = attrs.field(default=None, kw_only=True)
    seed: int = attrs.field(default=0, kw_only=True)
    metrics: dict[str, float] = attrs.field(factory=dict, init=False)  # of the newest epoch, to be logged
    _thread: threading.Thread | None = attrs.field(default=None, init=False)
    _hashes: dict[str, int] | None = attrs.field(default=None, init=False)
    _error: str = attrs.field(default="", init=False)  # why the newest version could not be written

    def __call__(self, epoch: int) -> Rows:
        """The rows to train `epoch` on."""
        version = self._scheduled(epoch)
        if version is None:
            self._begin(epoch // self.every_n_epochs)
            version = self._newest()
            self._schedule(epoch, version)
        elif version:
            self._write(version)  # already complete, unless its folder was lost
        self.metrics = {"refresh/version": float(version), "refresh/failed": float(bool(self._error))}
        return self._rows_of(version) if version else self.rows

    def wait(self) -> None:
        """Wait for the version that is being written, if any."""
        if self._thread is not None:
            self._thread.join()

    # ---- versions

    def _begin(self, version: int) -> None:
        """Write `version`, now or in a thread, unless it is there or another one is being written."""
        busy = self._thread is not None and self._thread.is_alive()
        if not version or busy or (self._folder_of(version) / COMPLETE).exists():
            return
        if getattr(self.writer, "in_process", False):
            self._try(version)
        else:
            self._thread = threading.Thread(target=self._try, args=(version,), name="captions", daemon=True)
            self._thread.start()

    def _try(self, version: int) -> None:
        try:
            self._write(version)
            self._error = ""
        except Exception as error:  # noqa: BLE001  (whatever a writer raises must not stop training)
            if not self._error:
                print(f"no new captions, training goes on with those it has: {error}", flush=True)
            self._error = str(error) or type(error).__name__

    def _write(self, version: int) -> None:
        """Write what is missing of `version`, and then that it is complete."""
        folder = self._folder_of(version)
        if (folder / COMPLETE).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        journal = self._journal(version)
        try:
            pictures = pictures_of(self.rows)
            wanted = requests(self._hashes_of_rows(), self.prompts, journal.written())
            sampling = self._sampling_of(version)
            write_captions(pictures, wanted, self.prompts, self.writer, journal, sampling, lambda progress: None)
            kept = self._kept(list(journal.entries()))
        finally:
            journal.close()
        write_json(folder / COMPLETE, {"captions": kept, "writer": self.writer.name, "revision": self.writer.revision})

    def _kept(self, entries: list[Entry]) -> dict[str, list[str]]:
        """The captions that pass, by the SHA-256 of their picture."""
        good = [entry for entry in entries if not entry.reason and entry.text]
        passed = [True] * len(good) if self.keep is None else list(self.keep(good))
        captions: dict[str, list[str]] = {}
        for entry, passes in zip(good, passed, strict=True):
            if passes:
                captions.setdefault(entry.image, []).append(entry.text)
        return captions

    def _rows_of(self, version: int) -> Rows:
        captions = read_json(self._folder_of(version) / COMPLETE)["captions"]
        places = self._hashes_of_rows()
        new = {places[digest]: texts for digest, texts in captions.items() if digest in places}
        return RecaptionedRows(self.rows, new, self.weight, self.seed, version)

    def _hashes_of_rows(self) -> dict[str, int]:
        if self._hashes is None:
            self._hashes = hashes_of(pictures_of(self.rows), Shard())
        return self._hashes

    def _newest(self) -> int:
        complete = [
            int(path.parent.name.removeprefix("version-")) for path in self.folder.glob(f"version-*/{COMPLETE}")
        ]
        return max(complete, default=0)

    def _folder_of(self, version: int) -> Path:
        return self.folder / f"version-{version}"

    def _journal(self, version: int) -> Journal:
        path, writer = self._folder_of(version) / journal_name(Shard()), self.writer
        return Journal(path, writer=writer.name, revision=writer.revision, sampling=self._sampling_of(version))

    def _sampling_of(self, version: int) -> Sampling:
        return attrs.evolve(self.sampling, seed=self.sampling.seed + version)

    # ---- the schedule

    def _scheduled(self, epoch: int) -> int | None:
        return self._read_schedule().get(str(epoch))

    def _schedule(self, epoch: int, version: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SCHEDULE, self._read_schedule() | {str(epoch): version})

    def _read_schedule(self) -> dict[str, int]:
        path = self.folder / SCHEDULE
        return read_json(path) if path.exists() else {}
