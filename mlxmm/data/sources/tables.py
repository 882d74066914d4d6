"""The tables of a source, as `datasets`, which is read here only, has them: pictures are not decoded."""

import contextlib
import glob
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import attrs

from mlxmm.errors import UserError
from mlxmm.preprocessing.images import SUFFIXES

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
PACKED = (".parquet", ".zip", ".tar", ".gz")  # other files of a folder that may hold pictures
FOLDER = f"a folder holds {', '.join(SUFFIXES)}, and a metadata.jsonl or .csv with the columns file_name and caption"


@attrs.frozen(kw_only=True)
class Columns:
    """What a source calls its columns."""

    image: str
    caption: str
    split: str | None


def open_tables(source: str, columns: Columns, *, streaming: bool = False, **options) -> dict:
    """The tables of `source` by its own names of splits: a `datasets.Dataset` each, or an `IterableDataset`.

    `source` is a parquet file or glob, a folder of images with metadata.jsonl or .csv, or a data set on the Hub.
    Raises `UserError` where it or a column is not there.
    """
    import datasets

    datasets.disable_progress_bars()
    if Path(source).is_dir() and not _has_files(Path(source), (*SUFFIXES, *PACKED)):
        raise UserError(f"{source} holds no pictures: {FOLDER}")
    tables = _load(source, streaming=streaming, **options)
    names = next(iter(tables.values())).column_names or []  # of some kinds of files a stream does not know them
    for column in (columns.image, columns.caption, columns.split):
        if column is not None and column not in names:
            hint = f"; {FOLDER}" if Path(source).is_dir() else ""
            raise UserError(f"{source} has no column {column!r}; it has {', '.join(names)}{hint}")
    kind = next(iter(tables.values())).features[columns.caption]
    if not _holds_captions(kind):
        raise UserError(f"column {columns.caption!r} of {source} holds no captions, one or a list, but {kind}")
    if streaming:  # pictures on the Hub are decoded before `cast_column` comes, unless told not to
        tables = {name: table.decode(False) for name, table in tables.items()}
    return {name: table.cast_column(columns.image, datasets.Image(decode=False)) for name, table in tables.items()}


def _holds_captions(kind) -> bool:
    if hasattr(kind, "int2str"):  # classes
        return True
    one = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return getattr(one, "dtype", None) in ("string", "large_string", "null")


def _has_files(folder: Path, suffixes: Sequence[str]) -> bool:
    return any(path.suffix.lower() in suffixes for path in folder.rglob("*"))


def _load(source: str, *, revision: str | None, **options) -> dict:
    import datasets

    if Path(source).is_dir():
        files = {path.name for path in Path(source).rglob("*.parquet")} - {"metadata.parquet"}  # an image folder's own
        kind = "parquet" if files else "imagefolder"
        return datasets.load_dataset(kind, data_dir=source, **options)
    if files := sorted(glob.glob(source)):
        return datasets.load_dataset("parquet", data_files=files, **options)
    if source.endswith(".parquet") or source.count("/") != 1:
        raise UserError(f"{source} is not there: neither a parquet file, a glob, a folder nor a Hub id")
    return datasets.load_dataset(source, revision=revision, **options)


@contextlib.contextmanager
def reading_errors(source: str) -> Iterator[None]:
    """Whatever `datasets` raises in the block, as one line about `source`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its readers' exceptions, and the network's
        error = error.__cause__ or error
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{source} cannot be read: {type(error).__name__}: {line}") from error


def check_splits(source: str, found: Collection[str], tables: dict) -> None:
    """Raise `UserError` where one of our splits has no rows."""
    if empty := [split for split in SPLITS if split not in found]:
        raise UserError(f"{source} has no rows for {', '.join(empty)}; its splits are {', '.join(tables)}")


def captions_in_cell(value, kind) -> list[str]:
    """The captions in a cell: a string, several, or the number of a class, which its column's `kind` has a name for."""
    if isinstance(value, int):
        value = kind.int2str(value) if value >= 0 else None  # -1: of a class that is not told
    texts = [value] if isinstance(value, str) else list(value or ())
    return [text.strip() for text in texts if text and text.strip()]


def in_memory(rows: list[dict], like):
    """A `datasets.Dataset` of these rows, with the features of the table `like`."""
    import datasets

    return datasets.Dataset.from_list(rows, features=like.features)


def with_bytes(image: dict | None) -> dict | None:
    """A picture that is a file elsewhere, with what that file holds."""
    if not image or image["bytes"] is not None or "://" not in (image["path"] or ""):
        return image
    from datasets.utils.file_utils import xopen

    with xopen(image["path"], "rb") as file:
        return image | {"bytes": file.read()}
