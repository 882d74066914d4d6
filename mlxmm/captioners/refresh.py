"""New captions while training goes on, version by version, each kept in a folder (`refresh_folder.py`).

Which version an epoch was trained on is written down before the epoch begins, so that a resumed run trains on the same
ones, however long writing takes the second time.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs
from attrs.validators import ge, optional
from PIL import Image

from mlxmm.captioners.caption_writer import CaptionWriter, Sampling
from mlxmm.captioners.job import Progress, Shard, hashes_of, journal_name, requests, write_captions
from mlxmm.captioners.journal import Entry, Journal
from mlxmm.captioners.refresh_folder import COMPLETE, RefreshFolder
from mlxmm.captioners.refreshed_rows import RecaptionedRows, extended
from mlxmm.data.pictures import Pictures, pictures_of
from mlxmm.data.sources.rows import Rows
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.export.dataset import public_name
from mlxmm.terminal import counted, say

GRACE = 5.0  # seconds that a thread has to end, once its writer is closed


@attrs.frozen(kw_only=True)
class WrittenVersion:
    """All captions of a version, before they are judged."""

    version: int
    folder: Path
    entries: Sequence[Entry]
    pictures: Pictures
    places: Mapping[str, int]  # of the pictures, by the SHA-256 of their files
    sampling: Sampling
    caption_now: Callable[[str], str]  # what the picture of this SHA-256 has in training now; "" if nothing


@attrs.frozen
class Judged:
    """The captions of a version that passed the filters, by the SHA-256 of their picture, and what is logged of it."""

    captions: Mapping[str, list[str]]
    metrics: Mapping[str, float]


Judge = Callable[[WrittenVersion], Judged]  # with `in_process` True if it computes with MLX


def keep_all(written: WrittenVersion) -> Judged:
    """Keep every caption that holds text."""
    made = [entry for entry in written.entries if not entry.reason]
    kept = [entry for entry in made if entry.text]
    captions: dict[str, list[str]] = {}
    for entry in kept:
        captions.setdefault(entry.image, []).append(entry.text)
    return Judged(captions, {"made": len(made), "kept": len(kept), "dropped_empty": len(made) - len(kept)})


class _Stopped(Exception):
    """`close` was called while a thread was writing."""


@attrs.define
class CaptionRefresh:
    """The rows of each epoch, for `SyntheticRefresh(CaptionRefresh(...))`, with new captions from the first version on.

    Without `pictures`, a fraction `weight` of `rows` has new captions in place of its own. With them, so many of these
    unlabelled pictures are added to the rows, in every epoch others. A new version is begun every `every_n_epochs`
    epochs, or every `every_n_train_steps` updates, with a seed of its own; an epoch that has begun keeps its rows.

    A writer that computes in this process (`in_process`) writes between two epochs; any other in a thread, and the
    first epoch after it is complete has it. A writer that fails never stops training: `metrics` say so, and it is asked
    for the rest later. Pictures that are in `held_out` too get no captions. `judge` filters captions; where it computes
    with MLX, it runs between two epochs. `on_complete` is called after each version.

    Of several processes, rank 0 writes: only there is a `writer` needed. The folder must be one that all see.
    """

    folder: RefreshFolder = attrs.field(converter=lambda path: RefreshFolder(path))
    rows: Rows
    writer: CaptionWriter | None
    prompts: Mapping[str, str]
    sampling: Sampling = Sampling(temperature=1.0)
    weight: float = attrs.field(default=0.5, validator=ge(0), kw_only=True)
    every_n_epochs: int = attrs.field(default=1, validator=ge(1), kw_only=True)
    every_n_train_steps: int | None = attrs.field(default=None, validator=optional(ge(1)), kw_only=True)
    pictures: Pictures | None = attrs.field(default=None, kw_only=True)
    held_out: Sequence[Pictures] = attrs.field(default=(), kw_only=True)
    judge: Judge = attrs.field(default=keep_all, kw_only=True)
    on_complete: Callable[[], None] = attrs.field(default=lambda: None, kw_only=True)
    seed: int = attrs.field(default=0, kw_only=True)
    metrics: dict[str, float] = attrs.field(factory=dict, init=False)  # of the newest epoch, to be logged
    _epoch: int = attrs.field(default=-1, init=False)  # the newest one
    _version: int = attrs.field(default=0, init=False)  # its version
    _step: int = attrs.field(default=0, init=False)
    _made: tuple = attrs.field(default=(None, None), init=False)  # (version, epoch) of the newest rows, and these
    _thread: threading.Thread | None = attrs.field(default=None, init=False)
    _written: int = attrs.field(default=0, init=False)  # by a thread, and to be judged between two epochs
    _places: dict[str, int] | None = attrs.field(default=None, init=False)
    _hashing: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _error: str = attrs.field(default="", init=False)  # why no version could be written since the newest
    _closed: threading.Event = attrs.field(factory=threading.Event, init=False)

    # ---- what SyntheticRefresh calls

    def __call__(self, epoch: int) -> Rows:
        """The rows to train `epoch` on. A collective call. Raises `UserError` if their version is gone."""
        self._version, failed = self._on_rank_zero(lambda: [self._version_of(epoch), bool(self._error)])
        self._epoch = epoch
        values = self.folder.read(self._version)["metrics"] if self._version else {}
        self.metrics = {"refresh/version": float(self._version), "refresh/failed": float(failed)}
        self.metrics |= {f"refresh/{name}": float(value) for name, value in values.items()}
        return self._rows_of(self._version, epoch)

    def advance(self, step: int) -> None:
        """Note that `step` updates are done: a thread begins a version that is due by them."""
        self._step, every = step, self.every_n_train_steps
        if every and step % every == 0 and self.writer is not None and not self._in_process:
            self._begin(step // every)

    def samples(self, most: int) -> list[tuple[Image.Image, str, str]]:
        """(picture, old caption, new caption) of the first pictures of the newest epoch's version, if it is new."""
        before = self.folder.scheduled(self._epoch - 1) or 0
        if not self._version or self._version == before:
            return []
        captions, pictures = self.folder.read(self._version)["captions"], self._all_pictures
        shown = [(digest, texts[0]) for digest, texts in captions.items() if digest in self._places_of_pictures()]
        old = self._captions_of(before)
        return [(pictures[self._places[digest]], old(digest), new) for digest, new in shown[:most]]

    def state_dict(self) -> dict:
        """The version of the newest epoch, with the SHA-256 of what it is."""
        return {"epoch": self._epoch, "version": self._version, "sha256": self.folder.digest(self._version)}

    def load_state_dict(self, state: dict) -> None:
        """Raise `UserError` if the version that the checkpoint was trained on is gone, or another one."""
        version = state["version"]
        if self.folder.digest(version) != state["sha256"]:
            path = self.folder.version(version) / COMPLETE
            how = "has changed" if path.exists() else "is not there"
            raise UserError(f"{path} {how}, and the checkpoint was trained on it: put it back, or start a new run")
        if state["epoch"] >= 0 and collectives.rank() == 0:
            self.folder.schedule(state["epoch"], version)

    def lineage(self) -> list[dict]:
        """What each version is that an epoch was trained on: see `mlxmm/storage/lineage.py`."""
        return [self._described(version) for version in self.folder.trained_on()]

    def _described(self, version: int) -> dict:
        values = self.folder.read(version)
        number = sum(map(len, values["captions"].values()))
        by = {"captioner": public_name(values["writer"]), "revision": values["revision"], "quantization": None}
        dropped = {name: int(n) for name, n in values["metrics"].items() if name.startswith("dropped_") and n}
        return {
            "source": f"refresh, version {version}",
            "config_name": None,
            "revision": None,
            "fingerprint": self.folder.digest(version),
            "weight": self.weight,
            "rows": {"train": len(values["captions"])},
            "where": {},
            "captioners": [by | {"captions": number}],
            "filters": {name.removeprefix("dropped_"): n for name, n in dropped.items()},
        }

    def wait(self) -> None:
        """Wait for the version that is being written, if any."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stop writing, and close the writer. What was written stays, for a run that is resumed."""
        self._closed.set()
        if self.writer is not None:
            self.writer.close()
        if self._thread is not None:
            self._thread.join(GRACE)

    # ---- which version

    def _on_rank_zero(self, make: Callable[[], list]) -> list:
        """What `make()` returns on rank 0. The others wait for it, and it lets them know after each batch."""
        value = None
        if collectives.rank() == 0:
            try:
                value = make()
            finally:
                collectives.all_max(1)
        else:
            while collectives.all_max(0) == [0]:
                pass
        return collectives.broadcast_object(lambda: value)

    def _version_of(self, epoch: int) -> int:
        if self._epoch < 0:
            self.folder.remove_leftovers()
        scheduled = self.folder.scheduled(epoch)
        if scheduled is None or not self._in_process:  # a thread may go on while epochs are repeated
            self._finish_written()
            self._begin(self._step // self.every_n_train_steps if self.every_n_train_steps else self._due_at(epoch))
        version = self.folder.newest() if scheduled is None else scheduled
        self.folder.schedule(epoch, version)
        return version

    def _due_at(self, epoch: int) -> int:
        return epoch // self.every_n_epochs

    @property
    def _in_process(self) -> bool:
        return getattr(self.writer, "in_process", False)

    # ---- writing

    def _begin(self, due: int) -> None:
        """Go on with the version that was begun, or begin the one that is due, unless a thread is writing."""
        version = self.folder.unfinished() or due
        if not version or self.folder.is_complete(version) or (self._thread is not None and self._thread.is_alive()):
            return
        if self._in_process:
            self._try(self._make, version)
        else:
            work = self._write if getattr(self.judge, "in_process", False) else self._make
            self._thread = threading.Thread(target=self._try, args=(work, version), name="captions", daemon=True)
            self._thread.start()

    def _finish_written(self) -> None:
        """Judge what a thread has written, where the judge computes with MLX: that is for the thread that trains."""
        version, self._written = self._written, 0
        if version:
            self._try(self._finish, version)

    def _try(self, work: Callable[[int], None], version: int) -> None:
        try:
            work(version)
        except Exception as error:  # whatever a writer or a filter raises must not stop training
            why = str(error) or type(error).__name__
            if why != self._error and not self._closed.is_set():
                say(f"no new captions by {self.writer.name}, training goes on with those it has: {why}")
            self._error = why

    def _make(self, version: int) -> None:
        self._write(version)
        self._finish(version)

    def _write(self, version: int) -> None:
        """Write what is missing of the captions of `version`."""
        self.folder.version(version).mkdir(parents=True, exist_ok=True)
        with contextlib.closing(self._journal(version)) as journal:
            wanted = requests(self._places_of_pictures(), self.prompts, journal.written())
            what = self._all_pictures, wanted, self.prompts, self.writer, journal, self._sampling_of(version)
            write_captions(*what, self._on_progress)
        self._written = version

    def _on_progress(self, progress: Progress) -> None:
        if self._closed.is_set():
            raise _Stopped
        if self._in_process:
            collectives.all_max(0)

    def _finish(self, version: int) -> None:
        """Judge the captions of `version`, and write that it is complete."""
        with contextlib.closing(self._journal(version)) as journal:
            entries = list(journal.entries())
        written = WrittenVersion(
            version=version,
            folder=self.folder.version(version),
            entries=entries,
            pictures=self._all_pictures,
            places=self._places_of_pictures(),
            sampling=self._sampling_of(version),
            caption_now=self._captions_of(self.folder.newest()),
        )
        judged = self.judge(written)
        by = {"writer": self.writer.name, "revision": self.writer.revision}
        self.folder.finish(version, {**by, "metrics": dict(judged.metrics), "captions": dict(judged.captions)})
        self._written, self._error = 0, ""
        self.on_complete()

    def _journal(self, version: int) -> Journal:
        path, writer = self.folder.version(version) / journal_name(Shard()), self.writer
        return Journal(path, writer=writer.name, revision=writer.revision, sampling=self._sampling_of(version))

    def _sampling_of(self, version: int) -> Sampling:
        return attrs.evolve(self.sampling, seed=self.sampling.seed + version)

    # ---- pictures and rows

    @property
    def _all_pictures(self) -> Pictures:
        return pictures_of(self.rows) if self.pictures is None else self.pictures

    def _places_of_pictures(self) -> dict[str, int]:
        """The place of each picture by the SHA-256 of its file, without those that are held out."""
        with self._hashing:
            if self._places is None:
                places = hashes_of(self._all_pictures, Shard())
                held_out = {digest for pictures in self.held_out for digest in hashes_of(pictures, Shard())}
                found = held_out & places.keys()
                if found and collectives.rank() == 0:
                    say(f"without new captions, as val or test has them too: {counted(len(found), 'picture')}")
                self._places = {digest: place for digest, place in places.items() if digest not in found}
        return self._places

    def _captions_of(self, version: int) -> Callable[[str], str]:
        """The first caption that a picture has in `version`; "" if none."""
        captions = self.folder.read(version)["captions"] if version else {}

        def caption(digest: str) -> str:
            if digest in captions:
                return captions[digest][0]
            own = self.rows.without_image(self._places_of_pictures()[digest]) if self.pictures is None else {}
            return own.get("captions", [""])[0]

        return caption

    def _rows_of(self, version: int, epoch: int) -> Rows:
        """The same object for the same rows."""
        if not version:
            return self.rows
        key = (version, epoch if self.pictures is not None else 0)
        if self._made[0] != key:
            self._made = key, self._new_rows(version, epoch)
        return self._made[1]

    def _new_rows(self, version: int, epoch: int) -> Rows:
        captions, places = self.folder.read(version)["captions"], self._places_of_pictures()
        if self.pictures is None:
            new = {places[digest]: texts for digest, texts in captions.items() if digest in places}
            return RecaptionedRows(self.rows, new, self.weight, self.seed, version)
        count = round(self.weight * len(self.rows))
        return extended(self.rows, self.pictures, captions, places, count, [self.seed, version, epoch])
