"""What a path holds: which files `datasets` reads and in which split each is, or pictures listed with their captions.

*.parquet, *.tar                     files, read by `datasets`
FOLDER                               of these; or of pictures with metadata, with .txt beside them, or in class folders
*.csv, *.tsv, *.jsonl, *.json        lists of pictures: open_clip's, COCO's captions, Karpathy's splits
"""

import codecs
import glob
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import attrs

from mlxmm.data.sources.caption_tables import NOT_UTF8, is_text_table, text_rows
from mlxmm.data.sources.captions import cells_at, matching, texts_in
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import SUFFIXES
from mlxmm.preprocessing.picture_folder import files_below, left_out
from mlxmm.storage import json_values
from mlxmm.storage.disk import require_file
from mlxmm.terminal import say

SPLITS = {
    "train": ("train", "training", "restval"),  # restval: the pictures of COCO's val that Karpathy's split trains on
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
RANDOM = "random"  # in place of a split column: all rows are divided at random, whatever splits the source has
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
WORD = re.compile(rf"(?:^|[-_. ])({'|'.join(SPLIT_OF)})(?=[-_. 0-9])")  # of a file's name that says its split
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMNS = ("file_name", "filepath", "filename", "file", "image", "image_path", "path")
CAPTION_COLUMNS = ("title", "caption", "captions", "text", "txt")
MAX_BRACKETS = 500  # of a line that is not looked at more closely
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
FORMATS = (
    "a source is a parquet file or glob, tar shards of WebDataset, a .csv, .tsv or .jsonl of file names and captions, "
    "a .json of COCO's captions or Karpathy's splits, a folder, or a data set on the Hub (docs/your-own-data.md)"
)


@attrs.frozen
class Files:
    """Files by split, and the builder of `datasets` that reads them."""

    builder: str
    by_split: Mapping[str, Sequence[str]]


@attrs.frozen
class Listed:
    """The columns of each split of a table of pictures: "image" holds the paths of their files."""

    by_split: Mapping[str, Mapping[str, list]]


def find_local(
    source: str, image_folder: str | None, caption_column: str | None, *, streaming: bool = False
) -> Files | Listed | None:
    """What a path or glob holds; None if nothing is there. Raises `UserError` for a kind of file that is not read."""
    if os.path.isdir(source):
        found = _in_folder(Path(source))
        is_csv = not streaming and isinstance(found, Files) and found.builder == "imagefolder"
        return (_metadata_csv(Path(source), found, caption_column) if is_csv else None) or found
    files = [Path(source)] if os.path.isfile(source) else [Path(name) for name in sorted(glob.glob(source))]
    _require_files(files)
    kinds = {BUILDERS.get(path.suffix.lower()) for path in files}
    if len(kinds) == 1 and (builder := kinds.pop()):
        return Files(builder, {"train": list(map(str, files))})
    if not files:
        return None
    if not all(is_text_table(path.name) for path in files):
        raise UserError(f"{next(p for p in files if not is_text_table(p.name))} is not read: {FORMATS}")
    return _listed(files, image_folder, caption_column)


def _in_folder(folder: Path) -> Files | Listed:
    paths = files_below(folder)
    _require_files([path for path in paths if path.name in METADATA or path.suffix.lower() in (".parquet", ".tar")])
    of_kind = lambda *suffixes: [path for path in paths if path.suffix.lower() in suffixes]
    tables = [path for path in of_kind(".parquet") if path.name not in METADATA]
    pictures, metadata = of_kind(*SUFFIXES), [path for path in paths if path.name in METADATA]
    if tables or (of_kind(".tar") and not pictures):
        files = tables or of_kind(".tar")
        return Files("parquet" if tables else "webdataset", _by_split(folder, files, by_name=True))
    if (told := left_out(paths)) and collectives.rank() == 0:
        say(told)
    if not pictures:
        packed = next((f"{path.name} is not read, unpack it; " for path in of_kind(".zip", ".gz")), "")
        raise UserError(f"{folder} holds no pictures: {packed}{_folder_help()}")
    for path in metadata:
        _check_metadata(path)
    if not metadata and any(path.with_suffix(".txt").is_file() for path in pictures):
        return _with_texts(folder, pictures)
    return Files("imagefolder", _by_split(folder, [*pictures, *metadata], by_name=False))


def _require_files(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            require_file(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _metadata_csv(folder: Path, found: Files, caption_column: str | None) -> Listed | None:
    """A folder whose metadata are .csv files, as a list; None for others. `datasets` takes captions that are NA, null
    or None for none."""
    paths = [Path(name) for names in found.by_split.values() for name in names]
    metadata = [path for path in paths if path.name in METADATA]
    if not metadata or any(path.suffix != ".csv" for path in metadata):
        return None
    rows = [row for path in metadata for row in _with_paths(path, text_rows(path), path.parent)]
    listed = _table(rows, caption_column if caption_column in rows[0] else None, caption_column or "")
    columns = listed.by_split.get("train", {})
    if len(listed.by_split) > 1 or not columns:
        return listed
    places = [Path(os.path.relpath(name, os.path.abspath(folder))) for name in columns["image"]]
    return _split_columns(columns, [split_of(place, by_name=False) for place in places])


def _folder_help() -> str:
    return (
        f"a folder holds {', '.join(SUFFIXES)}, and a metadata.jsonl or .csv with the columns file_name and caption, "
        "or a .txt beside each picture; or it holds parquet files, or tars"
    )


def has_no_captions(folder: str) -> str:
    """What to do about a folder of pictures without captions."""
    lists = [path.name for path in Path(folder).rglob("*.json")][:1]
    return f"; name the list itself, --data.source …/{lists[0]}" if lists else f"; {_folder_help()}"


def split_of(path: PurePosixPath | Path, *, by_name: bool) -> str | None:
    """The split that a relative path says: by a folder of that name, or with `by_name` by a word in the file's."""
    parts = [part.lower() for part in path.parts]
    named = next((SPLIT_OF[part] for part in parts[:-1] if part in SPLIT_OF), None)
    word = WORD.search(parts[-1]) if by_name and parts else None
    return named or (SPLIT_OF[word[1]] if word else None)


def split_of_label(label, kind=None) -> str | None:
    """The split that a label in a column means; `kind` is the column's feature, which may name classes."""
    named = name_of_label(label, kind)
    return SPLIT_OF.get(named.strip().lower()) if isinstance(named, str) else None


def name_of_label(label, kind):
    """A label as people read it: the name of a class, where the column's feature `kind` names classes."""
    return kind.int2str(label) if hasattr(kind, "int2str") and isinstance(label, int) and label >= 0 else label


def _by_split(folder: Path, files: Sequence[Path], *, by_name: bool) -> dict[str, list[str]]:
    """The files of each split; of one alone, where not every file says its own: a word in a name is then chance."""
    splits = [split_of(path.relative_to(folder), by_name=by_name) for path in files]
    if None in splits:
        return {"train": list(map(str, files))}
    own = {split: [str(path) for path, one in zip(files, splits) if one == split] for split in SPLITS}
    return {split: paths for split, paths in own.items() if paths}


def _with_texts(folder: Path, pictures: Sequence[Path]) -> Listed:
    """Pictures with a .txt beside each: a caption a line."""
    texts = [path.with_suffix(".txt") for path in pictures]
    captions = [_read(path).splitlines() if path.is_file() else [] for path in texts]
    return _split_columns(
        {"image": list(map(str, pictures)), "caption": captions},
        [split_of(path.relative_to(folder), by_name=False) for path in pictures],
    )


def _check_metadata(path: Path) -> None:
    """Raise `UserError` for a metadata file in UTF-16, of which `datasets` says something else, and for lines at which
    PyArrow would end the process: those without an object, and those that are nested deeply."""
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(NOT_UTF8.format(path))
        file.seek(0)
        if path.suffix == ".jsonl" and not any(line.lstrip(codecs.BOM_UTF8).lstrip().startswith(b"{") for line in file):
            raise UserError(f"{path} is no list of pictures: none of its lines is a JSON object")
        file.seek(0)
        if path.suffix == ".jsonl" and any(map(_nests_deeply, file)):
            raise UserError(f"{path} is no list of pictures: its values are nested too deeply")


def _nests_deeply(line: bytes) -> bool:
    if line.count(b"[") + line.count(b"{") < MAX_BRACKETS:
        return False
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError:  # which its reader says better
        return False
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except ValueError:
        raise UserError(NOT_UTF8.format(path)) from None


def _split_columns(columns: Mapping[str, list], splits: Sequence[str | None]) -> Listed:
    """The columns of each split; all as one, where not every row has one."""
    if None in splits:
        return Listed({"train": columns})
    rows = {split: [row for row, own in enumerate(splits) if own == split] for split in SPLITS if split in splits}
    take = lambda places: {name: [values[row] for row in places] for name, values in columns.items()}
    return Listed({split: take(places) for split, places in rows.items()})


def _listed(files: Sequence[Path], image_folder: str | None, caption_column: str | None) -> Listed:
    """Pictures that a list names, below its own folder or below `image_folder`."""
    rows: list[dict] = []
    for path in files:
        folder = Path(image_folder).expanduser() if image_folder else path.parent
        values = _json(path) if path.suffix.lower() == ".json" else None
        own = _annotated(values) if isinstance(values, dict) else None
        if own is None and isinstance(values, dict):
            raise UserError(f"{path} is neither COCO's captions nor Karpathy's splits: {FORMATS}")
        own = text_rows(path) if own is None else own
        rows += _with_paths(path, own, folder)
    name = next((one for one in [caption_column, *CAPTION_COLUMNS] if one and matching(one, list(rows[0]))), None)
    return _table(rows, name, caption_column or "caption")


def _json(path: Path):
    try:
        return json_values.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _annotated(values: Mapping) -> list[dict] | None:
    """The rows of COCO's captions, or of Karpathy's splits of COCO, Flickr30k and Flickr8k; None if it is neither."""
    images, annotations = values.get("images"), values.get("annotations")
    if not isinstance(images, list) or not images or not isinstance(images[0], dict):
        return None
    if "sentences" in images[0]:
        file = lambda one: str(PurePosixPath(one.get("filepath") or "", one["filename"]))
        texts = lambda one: [sentence["raw"] for sentence in one["sentences"]]
        return [{"file_name": file(one), "caption": texts(one), "split": one.get("split")} for one in images]
    if not isinstance(annotations, list) or not any("caption" in one for one in annotations[:1]):
        return None
    captions: dict = {one["id"]: [] for one in images}
    for one in annotations:
        captions.setdefault(one["image_id"], []).append(one["caption"])
    return [{"file_name": one["file_name"], "caption": captions[one["id"]]} for one in images]


def _with_paths(path: Path, rows: list[dict], folder: Path) -> list[dict]:
    """The rows with the paths of their pictures as "image". Raises `UserError` where there are none."""
    columns = list(rows[0]) if rows else []
    name = next((one for one in FILE_COLUMNS if one in columns), None)
    if name is None:
        raise UserError(
            f"{path} names no pictures in {', '.join(FILE_COLUMNS)}; it has {', '.join(columns) or 'no rows'}"
        )
    found = [row | {"image": inside(folder, str(row[name]), path)} for row in rows]
    if not any(os.path.isfile(row["image"]) for row in found):  # a few are named later, with the broken ones
        raise UserError(
            f"{path}: none of its pictures is there, as {found[0]['image']}; --data.image-folder names their folder"
        )
    return [{key: value for key, value in row.items() if key == "image" or key != name} for row in found]


def inside(folder: Path, name: str, source: str | Path) -> str:
    """The path of the file `name` in `folder`. Raises `UserError` if it is elsewhere: a list from others could name any
    file of this machine."""
    base = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(base, name))
    if "://" in name or os.path.commonpath([base, path]) != base:
        raise UserError(
            f"{source} names the picture {name!r}, which is not in {folder}: --data.image-folder names a folder"
        )
    return on_disk(path)


def on_disk(path: str) -> str:
    """The path of a file whose accents may be written in one code or in two: macOS writes names in two (NFD)."""
    if os.path.exists(path):
        return path
    forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next(filter(os.path.exists, forms), path)


def _table(rows: list[dict], caption: str | None, wanted: str) -> Listed:
    """A row for each picture, with all of its captions. Columns that differ between its captions are lists."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["image"], []).append(row)
    columns: dict[str, list] = {"image": list(groups)}
    if caption is not None:
        columns[wanted] = [[t for row in group for t in texts_in(cells_at(row, caption))] for group in groups.values()]
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in columns and name is not None and name not in (caption or "").split():
            cells = [[row.get(name) for row in group] for group in groups.values()]
            is_one = all(len(set(map(str, cell))) == 1 for cell in cells)
            columns[name] = _numbers([cell[0] for cell in cells]) if is_one else cells
    splits = [split_of_label(label) for label in columns.get("split", [None])]
    return _split_columns(columns, splits)


def _numbers(values: list) -> list:
    """Numbers, where all values are written as such: a CSV has texts alone."""
    for kind in (int, float):
        try:
            typed = [kind(value) if isinstance(value, str) else value for value in values]
            return values if kind is int and list(map(str, typed)) != list(map(str, values)) else typed  # as 007
        except ValueError:
            continue
    return values
