"""The tables of a source, read by `datasets` (imported here only). Images are not decoded."""

import contextlib
import glob
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import attrs

from mlxmm.data.sources.caption_tables import Entry, entries_of, is_text_table, text_rows
from mlxmm.data.sources.where import Condition, all_met
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import SUFFIXES
from mlxmm.storage.hub import card_configs, is_hub_id, split_revision

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
PACKED = (".parquet", ".zip", ".tar", ".gz")  # other files of a folder that may hold images
FOLDER = f"a folder holds {', '.join(SUFFIXES)}, and a metadata.jsonl or .csv with the columns file_name and caption"
WITHOUT_PICTURES = ": captions without their pictures; name these by --data.source, and give this as --data.captions"


@attrs.frozen(kw_only=True)
class Columns:
    """The names of a source's columns."""

    image: str
    caption: str | None  # None: captions are not read
    split: str | None
    conditions: tuple[Condition, ...] = ()  # which captions are read: typed ones, on columns that are there

    @property
    def of_captions(self) -> list[str]:
        """The columns that say which captions a row has."""
        return list(dict.fromkeys([self.caption, *(condition.column for condition in self.conditions)]))

    def met(self, values: dict) -> list[bool]:
        """For each caption of the row with these values, whether it is read."""
        return all_met(self.conditions, values, values[self.caption])

    def keep(self, values: dict) -> bool:
        """Whether a row is read: a caption of it is, or it has none, which is another fault."""
        met = self.met(values)
        return not met or any(met)


def open_tables(source: str, columns: Columns, *, streaming: bool = False, **options) -> dict:
    """The tables of `source`, by the names of its splits: `datasets.Dataset`, or `IterableDataset` with `streaming`.

    `source` is a parquet file or glob, a folder of images with metadata.jsonl or .csv, or a data set on the Hub, whose
    id may name a revision. Raises `UserError` if it or a column does not exist.
    """
    import datasets

    datasets.disable_progress_bars()
    if Path(source).is_dir() and not _has_files(Path(source), (*SUFFIXES, *PACKED)):
        raise UserError(f"{source} holds no pictures: {FOLDER}")
    tables = _load(source, streaming=streaming, **options)
    names = column_names(tables)
    for column in (columns.image, columns.caption, columns.split):
        if column is not None and column not in names:
            hint = WITHOUT_PICTURES if "image_sha256" in names else f"; {FOLDER}" if Path(source).is_dir() else ""
            raise UserError(f"{source} has no column {column!r}; it has {', '.join(names)}{hint}")
    kind = None if columns.caption is None else next(iter(tables.values())).features[columns.caption]
    if kind is not None and not _holds_captions(kind):
        raise UserError(
            f"column {columns.caption!r} of {source} must hold a caption or a list of captions; it holds {kind}"
        )
    if streaming:  # otherwise images on the Hub are decoded before `cast_column` applies
        tables = {name: table.decode(False) for name, table in tables.items()}
    return {name: table.cast_column(columns.image, datasets.Image(decode=False)) for name, table in tables.items()}


def _holds_captions(kind) -> bool:
    if hasattr(kind, "int2str"):  # classes
        return True
    one = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return getattr(one, "dtype", None) in ("string", "large_string", "null")


def _has_files(folder: Path, suffixes: Sequence[str]) -> bool:
    return any(path.suffix.lower() in suffixes for path in folder.rglob("*"))


def _load(source: str, *, revision: str | None, config_name: str | None = None, **options) -> dict:
    import datasets

    if Path(source).is_dir():
        if files_by_split := _files_of_card(Path(source), config_name):
            return datasets.load_dataset("parquet", data_files=files_by_split, **options)
        _check_no_config(source, config_name)
        files = {path.name for path in Path(source).rglob("*.parquet")} - {"metadata.parquet"}  # an image folder's own
        kind = "parquet" if files else "imagefolder"
        return datasets.load_dataset(kind, data_dir=source, **options)
    if files := sorted(glob.glob(source)):
        _check_no_config(source, config_name)
        return datasets.load_dataset("parquet", data_files=files, **options)
    if source.endswith(".parquet") or not is_hub_id(source):
        raise UserError(f"{source} is not there: neither a parquet file, a glob, a folder nor a Hub id")
    name, revision = split_revision(source, revision)
    return datasets.load_dataset(name, name=config_name, revision=revision, **options)


def _check_no_config(source: str, config_name: str | None) -> None:
    if config_name is not None:
        raise UserError(f"{source} has no configuration {config_name!r}: it has no card that names parquet files")


def _files_of_card(folder: Path, config_name: str | None) -> dict[str, list[str]]:
    """The parquet files of each split of a configuration (or of the default one), as the folder's card names them.

    Empty if there is no card, or if it names other files. Raises `UserError` if there is no such configuration.

    `datasets` reads cards itself, but finds what it cached of a folder by the folder's name, whatever is in it.
    """
    configs = card_configs(folder)
    names = [config.get("config_name") for config in configs]
    if configs and config_name is not None and config_name not in names:
        raise UserError(f"{folder} has no configuration {config_name!r}; it has {', '.join(map(str, names))}")
    is_wanted = lambda config: config.get("config_name") == (config_name or "default")
    is_default = lambda config: config_name is None and config.get("default")
    files = next((c.get("data_files") for c in configs if is_wanted(c) or is_default(c)), None)
    if not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
        return {}
    found = {str(entry["split"]): sorted(map(str, folder.glob(str(entry["path"])))) for entry in files}
    is_parquet = all(path.endswith(".parquet") for paths in found.values() for path in paths)
    return found if is_parquet and all(found.values()) else {}


@contextlib.contextmanager
def reading_errors(source: str) -> Iterator[None]:
    """Turn whatever `datasets` raises in the block into one `UserError` line about `source`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its readers' exceptions, and the network's
        error = error.__cause__ or error
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{source} cannot be read: {type(error).__name__}: {line}") from error


def check_splits(source: str, found: Collection[str], tables: dict) -> None:
    """Raise `UserError` if one of train, val and test has no rows."""
    if empty := [split for split in SPLITS if split not in found]:
        raise UserError(f"{source} has no rows for {', '.join(empty)}; its splits are {', '.join(tables)}")


def column_names(tables: dict) -> list[str]:
    """The columns of a source's tables; empty for streams of some file types, where they are not known."""
    return next(iter(tables.values())).column_names or []


def commit_of(table) -> str | None:
    """The commit that a `datasets.Dataset` of the Hub was read at: the folder of its cache is named after it."""
    folders = [Path(file["filename"]).parent.name for file in table.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)


def captions_in_row(values: dict, columns: Columns, features: dict) -> list[str]:
    """The captions of the row with these `values` that the conditions of `columns` leave."""
    cell, met = values[columns.caption], columns.met(values)
    if isinstance(cell, list):
        cell = [text for text, is_met in zip(cell, met) if is_met]
    return captions_in_cell(cell if any(met) else None, features[columns.caption])


def captions_in_cell(value, kind) -> list[str]:
    """The captions in a cell: one string, a list, or a class number, which the column's feature `kind` names."""
    if isinstance(value, int):
        value = kind.int2str(value) if value >= 0 else None  # -1: no label
    texts = [value] if isinstance(value, str) else list(value or ())
    return [text.strip() for text in texts if text and text.strip()]


def read_captions(names: Sequence[str], caption_column: str) -> list[Entry]:
    """The captions of the tables `names`, row by row. Raises `UserError` if one cannot be read or has none."""
    return [entry for name in names for entry in entries_of(name, _caption_rows(name), caption_column)]


def _caption_rows(name: str) -> list[dict]:
    """The rows of a table of captions, without its pictures if it has some."""
    files = [Path(file) for file in sorted(glob.glob(str(Path(name).expanduser())))]
    if is_text_table(name):
        if not files:
            raise UserError(f"--data.captions {name} is not there")
        return [row for file in files for row in text_rows(file)]
    with reading_errors(name):
        tables = _load(name, revision=None)
        is_picture = lambda kind: type(kind).__name__ == "Image"
        names = [key for key, kind in next(iter(tables.values())).features.items() if not is_picture(kind)]
        return [row for table in tables.values() for row in table.select_columns(names).to_list()]


def with_columns(table, columns: dict[str, list]):
    """The table with other columns; those that it has are replaced."""
    table = table.remove_columns([name for name in columns if name in table.column_names])
    for name, values in columns.items():
        table = table.add_column(name, values)
    return table


def in_memory(rows: list[dict], like):
    """A `datasets.Dataset` of these rows, with the features of the table `like`."""
    import datasets

    return datasets.Dataset.from_list(rows, features=like.features)


def with_bytes(image: dict | None) -> dict | None:
    """An image cell; if it names a remote file, with the bytes of that file."""
    if not image or image["bytes"] is not None or "://" not in (image["path"] or ""):
        return image
    from datasets.utils.file_utils import xopen

    with xopen(image["path"], "rb") as file:
        return image | {"bytes": file.read()}


def write_parquet(path: Path, rows: list[dict], columns: dict[str, str | list[str]]) -> None:
    """Write `rows` to a parquet file. The types of `columns` are those of Arrow, or "image"; lists in brackets."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({name: _feature(kind) for name, kind in columns.items()})
    values = {name: [row[name] for row in rows] for name in columns}
    datasets.Dataset.from_dict(values, features=features).to_parquet(path)


def _feature(kind: str | list[str]):
    import datasets

    if isinstance(kind, list):
        return [_feature(kind[0])]
    return datasets.Image() if kind == "image" else datasets.Value(kind)
