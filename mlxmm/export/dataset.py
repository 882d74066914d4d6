"""A data set of captions with their provenance: parquet files and a card, in a folder.

    README.md                                   the card
    <config>/<split>-00000-of-00001.parquet     a row for each picture: its captions, and how each was written
    <config of dropped>/train-….parquet         a row for each caption that a filter dropped, with the reasons

Pictures go along only if asked: who may publish captions may not publish pictures. Without them,
`--data.captions` finds each picture in its source by the SHA-256 of its file.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import Any

import attrs

from mlxmm.data.pictures import IDENTITY
from mlxmm.data.sources.tables import write_parquet
from mlxmm.errors import UserError
from mlxmm.export.dataset_card import CardFacts, Tally, dataset_card
from mlxmm.storage.atomic import new_folder, write_text
from mlxmm.storage.hub import is_hub_id

MAX_SHARD_ROWS, MAX_SHARD_BYTES = 100_000, 400_000_000  # bytes of pictures
PICTURE = {"image_sha256": "string", "width": "int32", "height": "int32"} | dict.fromkeys(
    ("source", "source_split", "source_revision", "row_id", *IDENTITY), "string"
)
CAPTION = {
    "caption": "string",
    "prompt_id": "string",
    "captioner": "string",
    "captioner_revision": "string",
    "quantization": "string",
    "sampling": "string",  # JSON
    "num_tokens": "int32",
    "finish_reason": "string",
    "clip_score": "float32",
    "stripped": "string",
    "created_at": "timestamp[s, tz=UTC]",
}
DROPPED = PICTURE | CAPTION | {"filters": ["string"], "reasons": ["string"]}


@attrs.frozen(kw_only=True)
class CaptionRecord:
    """A caption with its provenance."""

    text: str
    prompt: str  # its id
    captioner: str
    captioner_revision: str
    quantization: str | None = None
    sampling: dict[str, Any]
    num_tokens: int
    finish_reason: str
    clip_score: float | None = None
    stripped: str = ""  # boilerplate that was taken away before it
    created_at: float  # Unix time, in seconds
    flags: dict[str, str] = attrs.field(factory=dict)  # by filter, why it is dropped; empty: it is kept

    def values(self) -> dict:
        """The values of the columns `CAPTION`."""
        return {
            "caption": self.text,
            "prompt_id": self.prompt,
            "captioner": public_name(self.captioner),
            "captioner_revision": self.captioner_revision,
            "quantization": self.quantization,
            "sampling": json.dumps(self.sampling, sort_keys=True),
            "num_tokens": self.num_tokens,
            "finish_reason": self.finish_reason,
            "clip_score": self.clip_score,
            "stripped": self.stripped,
            "created_at": datetime.fromtimestamp(int(self.created_at), UTC),
        }


@attrs.frozen(kw_only=True)
class PictureRecord:
    """A picture with all of its captions."""

    sha256: str  # of its file
    width: int
    height: int
    source: str
    source_split: str
    source_revision: str | None = None
    row_id: str
    identity: Mapping[str, str] = attrs.field(factory=dict)  # what its source calls it: names of `IDENTITY`
    captions: Sequence[CaptionRecord]
    image: bytes | None = None  # its file

    def values(self) -> dict:
        """The values of the columns `PICTURE`."""
        return {
            "image_sha256": self.sha256,
            "width": self.width,
            "height": self.height,
            "source": public_name(self.source),
            "source_split": self.source_split,
            "source_revision": self.source_revision,
            "row_id": _without_folders(self.row_id),
            **{name: _without_folders(self.identity[name]) if name in self.identity else None for name in IDENTITY},
        }


def public_name(name: str) -> str:
    """A Hub id as it is; of a local path its last part alone: a data set names no folders of the one who made it. Of a
    run's checkpoint, the name of the run: each run has a `best`."""
    path = Path(name)
    run = path.parents[1].name if path.parent.name == "checkpoints" else ""
    return run or (name if is_hub_id(name) else path.name)


def _without_folders(name: str) -> str:
    """Of an absolute path, or the URL of a local file, its last part; else the `name` itself."""
    is_local = name.startswith(("/", "~/", "file:")) or PureWindowsPath(name).is_absolute()
    return PureWindowsPath(name).name if is_local else name


def dropped_config(config_name: str) -> str:
    """The name of the configuration that holds what was dropped from `config_name`."""
    return "dropped" if config_name == "default" else f"{config_name}-dropped"


def write_dataset(
    folder: Path,
    pictures: Iterable[PictureRecord],
    facts: CardFacts,
    *,
    include_images: bool = False,
    config_name: str = "default",
) -> dict[str, int]:
    """Write the data set into the new `folder`, whole or not at all; return how many pictures and captions it has.

    `pictures` are read once. Raises `UserError` if `folder` is not empty, if no caption is kept, or if pictures are to
    be included and one has none.
    """
    check_config_name(config_name)
    columns = (
        ({"image": "image"} if include_images else {}) | PICTURE | {name: [kind] for name, kind in CAPTION.items()}
    )
    tally = Tally()
    with new_folder(folder) as temporary:
        kept = _Shards(temporary / config_name, columns)
        dropped = _Shards(temporary / dropped_config(config_name), DROPPED)
        for picture in pictures:
            if include_images and picture.image is None:
                raise UserError(f"{picture.row_id} has no file: leave out the pictures, or give each")
            tally.add(picture)
            _add(picture, kept, dropped, include_images)
        splits = {config_name: kept.close(), dropped_config(config_name): dropped.close()}
        if not tally.num_captions:
            raise UserError(f"no caption is kept: {tally.num_dropped} were dropped")
        write_text(temporary / "README.md", dataset_card(tally, facts, splits, include_images=include_images))
    return {"pictures": tally.num_pictures, "captions": tally.num_captions, "dropped": tally.num_dropped}


def check_config_name(config_name: str) -> None:
    """Raise `UserError` for a name that the Hub, or a folder, cannot have."""
    if config_name in ("data", "dropped") or not config_name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"a configuration cannot be called {config_name!r}: take letters, digits, - and _")


def _add(picture: PictureRecord, kept: "_Shards", dropped: "_Shards", include_images: bool) -> None:
    captions = [caption.values() for caption in picture.captions if not caption.flags]
    if captions:
        image = {"image": {"bytes": picture.image, "path": None}} if include_images else {}
        lists = {name: [caption[name] for caption in captions] for name in CAPTION}
        split = "validation" if picture.source_split == "val" else picture.source_split
        kept.add(split, image | picture.values() | lists, len(picture.image or b"") if include_images else 0)
    for caption in picture.captions:
        if caption.flags:
            flags = {"filters": list(caption.flags), "reasons": list(caption.flags.values())}
            dropped.add("train", picture.values() | caption.values() | flags)


class _Shards:
    """The parquet files of one configuration: each is written when it is full."""

    def __init__(self, folder: Path, columns: dict):
        self.folder, self.columns = folder, columns
        self.rows: dict[str, list[dict]] = defaultdict(list)
        self.num_bytes: dict[str, int] = defaultdict(int)
        self.paths: dict[str, list[Path]] = defaultdict(list)

    def add(self, split: str, row: dict, num_bytes: int = 0) -> None:
        if len(self.rows[split]) == MAX_SHARD_ROWS or self.num_bytes[split] + num_bytes > MAX_SHARD_BYTES:
            self._write(split)
        self.rows[split].append(row)
        self.num_bytes[split] += num_bytes

    def close(self) -> list[str]:
        """Write what is left, name the files by their number; return the splits."""
        for split in self.rows:
            self._write(split)
            for number, path in enumerate(self.paths[split]):
                path.rename(path.with_name(f"{split}-{number:05}-of-{len(self.paths[split]):05}.parquet"))
        return list(self.rows)

    def _write(self, split: str) -> None:
        if rows := self.rows[split]:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"{split}-{len(self.paths[split])}.parquet"
            write_parquet(path, rows, self.columns)
            self.paths[split].append(path)
            self.rows[split], self.num_bytes[split] = [], 0
