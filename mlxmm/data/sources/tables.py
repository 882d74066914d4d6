"""The tables of a source, read by `datasets` (imported here only). Images are not decoded."""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np

from mlxmm.data.sources.arrow_columns import selected_rows
from mlxmm.data.sources.caption_tables import TEXT_FILES, Entry, entries_of, is_text_table, text_rows
from mlxmm.data.sources.captions import captions_at, matching, texts_in
from mlxmm.data.sources.formats import (
    BUILDERS,
    RANDOM,
    SPLITS,
    Files,
    Listed,
    find_local,
    has_no_captions,
    inside,
    on_disk,
    split_of,
    split_of_label,
)
from mlxmm.data.sources.picture_column import PictureColumn
from mlxmm.data.sources.where import Condition, all_met
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import SUFFIXES
from mlxmm.storage.hub import card_configs, go_offline_without_network, is_hub_id, is_offline, split_revision
from mlxmm.storage.remembered import state_of_files
from mlxmm.storage.retries import reading
from mlxmm.terminal import counted, say

REMOTE = ("hf://", "https://", "http://")
MAX_SHOWN = 80  # letters of a value in a message
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
    """The tables of `source`, by its splits: `datasets.Dataset`, or `IterableDataset` with `streaming`.

    `source` is what `formats.py` reads, or a data set on the Hub, whose id may name a revision. Raises `UserError` if
    it or a column does not exist.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of errors it raises too
    tables = _load(source, streaming=streaming, caption=columns.caption, **options)
    tables = _natural_names(tables, columns)
    if columns.caption is not None:
        tables = _with_caption_column(source, tables, columns.caption)
    names, features = column_names(tables), next(iter(tables.values())).features
    for column in (columns.image, columns.caption, None if columns.split == RANDOM else columns.split):
        if column is not None and column not in names:
            local = has_no_captions(source) if Path(source).is_dir() and column == columns.caption else ""
            hint = WITHOUT_PICTURES if "image_sha256" in names else local
            raise UserError(f"{source} has no column {column!r}; it has {', '.join(names)}{hint}")
    if columns.caption is not None and not _holds_captions(kind := features[columns.caption]):
        raise UserError(
            f"column {columns.caption!r} of {source} must hold a caption or a list of captions; it holds {kind}"
        )
    tables = {name: _with_pictures(source, table, columns.image, streaming) for name, table in tables.items()}
    if streaming:  # otherwise images on the Hub are decoded before `cast_column` applies
        tables = {name: table.decode(False) for name, table in tables.items()}
    return {name: _undecoded(table, columns.image) for name, table in tables.items()}


def _undecoded(table, column: str):
    """The table whose pictures are {"bytes", "path"} when they are read."""
    import datasets

    kind, is_stream = datasets.Image(decode=False), isinstance(table, datasets.IterableDataset)
    if is_stream or table.data.schema.field(column).type != kind.pa_type or selected_rows(table) is not None:
        return table.cast_column(column, kind)
    info = table.info.copy()  # `cast_column` would go through all chunks, though only a name changes
    info.features[column] = kind
    return datasets.Dataset(table.data, info, table.split, fingerprint=f"{table._fingerprint}-undecoded")


def _holds_captions(kind) -> bool:
    if hasattr(kind, "int2str"):  # classes
        return True
    one = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return getattr(one, "dtype", None) in ("string", "large_string", "string_view", "null")


def _natural_names(tables: dict, columns: Columns) -> dict:
    """Shards of WebDataset with the names that are asked for: their columns are called after files, as jpg and txt."""
    names, features = column_names(tables), next(iter(tables.values())).features
    if "__key__" not in names:
        return tables
    own = [name for name in names if type(features[name]).__name__ == "Image"]
    renamed = {own[0]: columns.image} if own and columns.image not in names else {}
    if columns.caption is not None and columns.caption not in names:
        fields = features.get("json") if isinstance(features.get("json"), dict) else {}
        nested = next((name for name in ("caption", "text", "captions") if name in fields), None)
        if "txt" in names:
            renamed["txt"] = columns.caption
        elif nested and columns.caption.partition(".")[0] not in names:
            tables = _derived(tables, columns.caption, ["json"], lambda row: captions_at(row, f"json.{nested}"))
    return {name: table.rename_columns(renamed) if renamed else table for name, table in tables.items()}


def _with_caption_column(source: str, tables: dict, wanted: str) -> dict:
    """Tables with the captions of all columns that `wanted` names, as one column of that name; of class folders, with
    the names of the classes."""
    names, features = column_names(tables), next(iter(tables.values())).features
    if wanted in names:
        return tables
    if all(matching(one, names) for one in wanted.split()):
        own = list(dict.fromkeys(name if name in names else name.partition(".")[0] for name in matching(wanted, names)))
        return _derived(tables, wanted, own, lambda row: captions_at(row, wanted))
    if Path(source).is_dir() and "label" in names and _has_classes(features["label"]):
        tell(f"{source} has no captions: the names of its {features['label'].num_classes} folders are taken for them")
        return _derived(tables, wanted, ["label"], lambda row: [features["label"].int2str(row["label"])])
    return tables


def _has_classes(feature) -> bool:
    """Whether a column of labels has names of classes: `datasets` takes folders of splits for classes, too."""
    return hasattr(feature, "int2str") and not all(map(split_of_label, feature.names))


def _derived(tables: dict, name: str, of_columns: list[str], value: Callable[[dict], list[str]]) -> dict:
    """Tables with a column of lists of texts, each computed from the values in `of_columns` of its row."""
    import datasets

    def derived(table):
        if isinstance(table, datasets.IterableDataset):
            features = table.features | {name: datasets.List(datasets.Value("string"))}
            return table.map(lambda row: {name: value(row)}, features=datasets.Features(features))
        return with_columns(table, {name: [value(row) for row in table.select_columns(of_columns)]})

    return {split: derived(table) for split, table in tables.items()}


def _with_pictures(source: str, table, column: str, streaming: bool):
    """The table with pictures in `column`, where it has paths: of files in the folder of `source`.

    Raises `UserError` if it has other things."""
    kind = table.features[column]
    is_picture = type(kind).__name__ == "Image" or set(kind if isinstance(kind, dict) else ()) == {"bytes", "path"}
    if is_picture and not streaming:
        return _with_own_files(source, table, column)
    if is_picture or getattr(kind, "dtype", None) in ("binary", "large_binary"):
        return table
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise UserError(f"column {column!r} of {source} does not hold pictures, but {kind}")
    if streaming:
        raise UserError(f"column {column!r} of {source} holds names of files, which are not streamed")
    paths = table[column][:]
    first = next((path for path in paths if path), "")
    if not first.lower().split("?")[0].endswith(SUFFIXES):
        shown = f"text of {len(first)} letters" if len(first) > MAX_SHOWN else repr(first)
        raise UserError(f"column {column!r} of {source} does not hold pictures, but {shown}")
    own = [_cell(source, path) for path in paths]
    return with_columns(table, {column: own})


def _cell(source: str, path: str | None) -> dict:
    return {"bytes": None, "path": inside(_folder_of(source), path, source) if path else None}


def _folder_of(source: str) -> Path:
    """The folder that the paths in a source are below."""
    if Path(source).is_dir():
        return Path(source)
    parents = [os.path.dirname(os.path.abspath(path)) for path in glob.glob(source)]
    return Path(os.path.commonpath(parents)) if parents else Path(source)


def _with_own_files(source: str, table, column: str):
    """The table whose pictures without bytes are files in the folder of `source`."""
    if table.info.builder_name == "imagefolder" and not is_hub_id(source):
        return _with_names_on_disk(table, _undecoded(table, column), column)
    if table.info.builder_name in ("imagefolder", None) or is_hub_id(source) and _is_image_folder(table):
        return table  # datasets itself made sure of it; or it is a list, of which `formats.py` did
    pictures = PictureColumn.of(table, column)
    rows = np.flatnonzero(pictures.num_bytes < 0).tolist()
    paths = [path for row in rows if (path := pictures.paths[row]) is not None]
    if not paths:
        return table
    if is_hub_id(source) or len(paths) < len(table):
        raise UserError(
            f"column {column!r} of {source} has names of files, as {paths[0]!r}, and not the pictures themselves"
        )
    return with_columns(table, {column: [_cell(source, path) for path in pictures.paths]})


def _with_names_on_disk(table, cells, column: str):
    """The table of a folder whose metadata may write the names of files otherwise than the disk does."""
    named = [(cell or {}).get("path") for cell in cells[column]]
    found = [path and on_disk(path) for path in named]
    own = [(cell and cell | {"path": path}) for cell, path in zip(cells[column], found)] if found != named else ()
    return with_columns(table, {column: own}) if own else table


def _is_image_folder(table) -> bool:
    return (table.info.builder_name or "").endswith("folder")


def _load(
    source: str,
    *,
    revision: str | None,
    config_name: str | None = None,
    image_folder: str | None = None,
    caption: str | None = None,
    **options,
) -> dict:
    import datasets

    if os.path.isdir(source) and (files_by_split := _files_of_card(Path(source), config_name)):
        return _read_files("parquet", files_by_split, **options)
    if (found := find_local(source, image_folder, caption, streaming=options.get("streaming", False))) is not None:
        _check_no_config(source, config_name)
        return _local_tables(source, found, **options)
    if not is_hub_id(source) or source.lower().endswith((*BUILDERS, *TEXT_FILES)):
        raise UserError(f"{source} is not there: neither a file, a glob, a folder nor a Hub id")
    name, revision = split_revision(source, revision)
    go_offline_without_network()
    datasets.config.HF_HUB_OFFLINE |= is_offline()  # which was read when it was imported
    load = lambda: datasets.load_dataset(name, name=config_name, revision=revision, **options)
    return load() if is_offline() else reading(load)


def _local_tables(source: str, found: Files | Listed, streaming: bool = False) -> dict:
    if streaming and isinstance(found, Listed):
        raise UserError(
            f"{source} is not streamed: files, folders and data sets on the Hub are; leave out --data.streaming"
        )
    if isinstance(found, Listed):
        report_restval(is_restval(one) for columns in found.by_split.values() for one in columns.get("split", ()))
        return {split: _listed_table(dict(columns)) for split, columns in found.by_split.items()}
    files = {split: list(names) for split, names in found.by_split.items()}
    tables = _read_files(found.builder, files, streaming=streaming)
    is_one_folder = found.builder == "imagefolder" and len(tables) == 1 and not streaming
    return _by_folder(tables, Path(source)) if is_one_folder else tables


def _read_files(builder: str, files: dict[str, list[str]], **options) -> dict:
    """The tables of files by split. `datasets` finds what it converted by the names and times of files: their sizes are
    told as a description, a part of the name in its cache. Of pictures in a folder it reads the names alone."""
    import datasets

    if builder != "imagefolder" and not options.get("streaming"):
        options["description"] = state_of_files([path for own in files.values() for path in own]).hex()
    return datasets.load_dataset(builder, data_files=files, **options)


def _listed_table(columns: dict[str, list]):
    import datasets

    columns["image"] = [{"bytes": None, "path": path} for path in columns["image"]]
    table = datasets.Dataset.from_dict(columns)
    return table.cast_column("image", datasets.Image(decode=False))


def _by_folder(tables: dict, folder: Path) -> dict:
    """The pictures of each split that the folders below `folder` are named after; as they are, if not each is in one:
    the metadata of all splits may be in one file."""
    import datasets

    [table] = tables.values()
    name = next((name for name, kind in table.features.items() if type(kind).__name__ == "Image"), None)
    cells = table.cast_column(name, datasets.Image(decode=False))[name] if name else []
    paths = [(cell or {}).get("path") for cell in cells]
    splits = [split_of(Path(os.path.relpath(path, folder)), by_name=False) for path in paths if path]
    if None in splits or len(splits) < len(table) or not splits:
        return tables
    rows = {split: [row for row, other in enumerate(splits) if other == split] for split in SPLITS if split in splits}
    return {split: table.select(places) for split, places in rows.items()}


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
        is_absent = is_hub_id(source) and type(error).__name__ in ("ConnectionError", "DatasetNotFoundError")
        where = (
            "is neither a file nor a folder here, and cannot be read from the Hub" if is_absent else "cannot be read"
        )
        raise UserError(f"{source} {where}: {type(error).__name__}: {line}") from error


def check_splits(
    source: str,
    found: Collection[str],
    names: Iterable,
    column: str | None = None,
    *,
    to_train: bool = True,
    hint: str = "",
) -> None:
    """Raise `UserError` if one of train, val and test has no rows, or, unless it is `to_train`, if all have none.

    `names` are the source's own for its splits, in a `column` or without. The `hint` is what to do if nothing is there
    to train on.
    """
    empty = [split for split in SPLITS if split not in found]
    if empty and (to_train or not found):
        said = f"its column {column!r} says" if column else "its splits are"
        line = f"{source} has no rows for {', '.join(empty)}; {said} {', '.join(map(str, names))}"
        raise UserError(line + (hint if "train" in empty else ""))


def tell(line: str) -> None:
    """Print a line, once for all processes."""
    if collectives.rank() == 0:
        say(line)


def is_restval(label) -> bool:
    """Whether a label is Karpathy's restval: rows of COCO's val that are trained on."""
    return str(label).lower() == "restval"


def report_restval(numbers: Iterable[int]) -> None:
    """Print how many rows of restval are trained on, of these numbers the sum: others leave them out."""
    if number := sum(numbers):
        tell(f"trained on: {counted(number, 'row')} of restval")


def concatenated(tables: Sequence):
    """The rows of several tables, one after the other."""
    import datasets

    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(list(tables))


def named_splits(tables: dict) -> dict:
    """The tables by our names of splits, those that have one: "train", "val", "test"."""
    by_split = {split: [tables[name] for name in names if name in tables] for split, names in SPLITS.items()}
    return {split: concatenated(own) for split, own in by_split.items() if own}


def column_names(tables: dict) -> list[str]:
    """The columns of a source's tables; empty for streams of some file types, where they are not known."""
    return next(iter(tables.values())).column_names or []


def commit_of(table) -> str | None:
    """The commit that a `datasets.Dataset` of the Hub was read at: the folder of its cache is named after it."""
    folders = [Path(file["filename"]).parent.name for file in table.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)


def captions_in_row(values: dict, columns: Columns, kind) -> list[str]:
    """The captions of the row with these `values` that the conditions of `columns` leave; `kind` is their feature."""
    cell, met = values[columns.caption], columns.met(values)
    if isinstance(cell, list):
        cell = [text for text, is_met in zip(cell, met) if is_met]
    return captions_in_cell(cell if any(met) else None, kind)


def captions_in_cell(value, kind) -> list[str]:
    """The captions in a cell: one string, a list, or a class number, which the column's feature `kind` names."""
    if isinstance(value, int):
        value = kind.int2str(value) if value >= 0 else None  # -1: no label
    return texts_in(value)


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


def with_files(table, paths: Sequence[Path], column: str):
    """The table with a further row for each of these pictures, whose other columns are empty."""
    import datasets

    cells = datasets.Dataset.from_dict({column: [{"bytes": None, "path": str(path)} for path in paths]})
    return datasets.concatenate_datasets([table, cells.cast_column(column, datasets.Image(decode=False))])


def in_memory(rows: list[dict], like):
    """A `datasets.Dataset` of these rows, with the features of the table `like`."""
    import datasets

    return datasets.Dataset.from_list(rows, features=like.features)


def with_bytes(image: dict | None, source: str) -> dict | None:
    """An image cell; if it names a remote file, or one in an archive, with the bytes of that file.

    Raises `UserError` if it names a local file that is not of `source`.
    """
    if not image or image["bytes"] is not None or not image["path"]:
        return image
    file = image["path"].rpartition("::")[2]
    if not file.startswith(REMOTE):
        inside(_folder_of(source), file, source)
    if "://" not in image["path"]:
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
