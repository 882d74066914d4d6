"""The journal of a captioning job: every caption that was written, found again by what it was written of and by.

One SQLite file in WAL mode. A caption that is in it survives `kill -9` and a loss of power; what is not in it is asked
for again. Its key is (SHA-256 of the image, prompt id, writer, its revision, sampling), never a position, so that a job
may be resumed with its pictures in another order, or with more of them.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from mlxmm.captioners.caption_writer import Sampling, WrittenCaption
from mlxmm.config import from_json, to_json
from mlxmm.errors import UserError
from mlxmm.storage import json_values

FAILED = "failed"  # finish reason of a caption that could not be written
KEY = "image, prompt, writer, revision, sampling"
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS captions (
    image TEXT NOT NULL, prompt TEXT NOT NULL, writer TEXT NOT NULL, revision TEXT NOT NULL, sampling TEXT NOT NULL,
    text TEXT NOT NULL, num_tokens INTEGER NOT NULL, finish_reason TEXT NOT NULL, reason TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY ({KEY})
) WITHOUT ROWID
"""


@attrs.frozen(kw_only=True)
class Entry:
    """A caption in the journal, or the reason why there is none."""

    image: str  # SHA-256 of the file's bytes, in hexadecimal
    prompt: str  # its id
    text: str
    num_tokens: int
    finish_reason: str
    reason: str = ""  # why it failed
    width: int
    height: int
    seconds: float  # Unix time of writing


class Journal:
    """The journal in the file `path`, for what one writer writes with one sampling."""

    def __init__(self, path: Path, *, writer: str, revision: str, sampling: Sampling):
        self.path, self.own = path, (writer, revision, json.dumps(to_json(sampling), sort_keys=True))
        self._connection = _open(path)

    def written(self) -> set[tuple[str, str]]:
        """(image, prompt) of all captions that are there, failed ones included. Raises `UserError` if it is damaged."""
        with _reading(self.path):
            return set(self._connection.execute(f"SELECT image, prompt FROM captions WHERE {_OWN}", self.own))

    def add(self, captions: Iterable[tuple[str, str, WrittenCaption]]) -> None:
        """Add (image, prompt, caption) in one transaction, on the disk when this returns. Raises `UserError`."""
        now = time.time()
        rows = [
            (image, prompt, *self.own, c.text, c.num_tokens, c.finish_reason, "", c.width, c.height, now)
            for image, prompt, c in captions
        ]
        self._insert(rows)

    def add_failure(self, image: str, prompt: str, reason: str) -> None:
        """Note that no caption could be written, so that it is not asked for again."""
        self._insert([(image, prompt, *self.own, "", 0, FAILED, reason, 0, 0, time.time())])

    def entries(self) -> Iterator[Entry]:
        """All captions, in the order of their keys: the same for the same captions, whenever they were written.

        Raises `UserError` if the journal is damaged.
        """
        names = [field.name for field in attrs.fields(Entry)]
        query = f"SELECT {', '.join(names)} FROM captions WHERE {_OWN} ORDER BY image, prompt"
        with _reading(self.path):
            for row in self._connection.execute(query, self.own):
                yield Entry(**dict(zip(names, row)))

    def take_in(self, path: Path) -> None:
        """Add all captions of another journal, of another shard of the job. Raises `UserError` where both have one, and
        if it is damaged."""
        with _reading(path):
            self._connection.execute("ATTACH ? AS other", (str(path),))
        try:
            with _reading(path), self._connection:
                query = f"SELECT count(*) FROM captions JOIN other.captions USING ({KEY})"
                [[num_double]] = self._connection.execute(query)
                if num_double:
                    raise UserError(f"{num_double} captions of {path} are there already: a shard was named twice")
                self._connection.execute(f"INSERT INTO captions SELECT * FROM other.captions WHERE {_OWN}", self.own)
        finally:
            self._connection.execute("DETACH other")

    def close(self) -> None:
        """Merge the log into the file; where the disk is full the log stays beside it, which is as good."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()

    def _insert(self, rows: list[tuple]) -> None:
        try:
            with self._connection:  # a second caption of one key is an error here, and never an overwrite
                self._connection.executemany(f"INSERT INTO captions VALUES ({', '.join('?' * 12)})", rows)
        except sqlite3.IntegrityError:  # a fault of the program
            raise
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path} cannot be written: {error}; what it holds stays") from None


def identity_of(path: Path) -> tuple[str, str, Sampling]:
    """Writer, revision and sampling of the captions in a journal. Raises `UserError` unless they are of one kind."""
    if not path.exists():
        raise UserError(f"{path} is not there: this shard has not been written")
    connection = _open(path)
    with contextlib.closing(connection), _reading(path):
        kinds = connection.execute("SELECT DISTINCT writer, revision, sampling FROM captions").fetchall()
    if len(kinds) != 1:
        raise UserError(f"{path} holds captions of {len(kinds)} writers or samplings; one was expected")
    [(writer, revision, sampling)] = kinds
    return writer, revision, from_json(Sampling, json_values.loads(sampling))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A damaged journal is a `UserError`."""
    try:
        yield
    except sqlite3.IntegrityError:  # a fault of the program
        raise
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is damaged, or its disk does not work: {error}") from None


_OWN = "writer = ? AND revision = ? AND sampling = ?"


def _open(path: Path) -> sqlite3.Connection:
    """Raises `UserError` if the file is no journal, or cannot be written."""
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=30)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # a commit waits for the disk
        connection.execute("PRAGMA fullfsync=ON")  # and on macOS for more than the disk's cache
        connection.execute(SCHEMA)
        return connection
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()  # or it would keep the file locked
        raise UserError(f"{path} cannot be opened as a journal of captions: {error}") from None
