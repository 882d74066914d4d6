"""Where training data come from: the lineage of one source, read from its rows, its provenance columns and its card."""

import glob
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlxmm.data.caption_config import SHAPES, CaptionDataConfig
from mlxmm.data.sources.caption_tables import CAPTIONER
from mlxmm.data.sources.rows import CaptionRows, Rows, is_stream
from mlxmm.data.sources.stream import StreamRows
from mlxmm.data.sources.tables import commit_of
from mlxmm.distributed import collectives
from mlxmm.storage.disk import read_text
from mlxmm.storage.hub import dataset_card, dataset_commit, is_hub_id, split_revision
from mlxmm.storage.lineage import filters_in_card


def describe(config: CaptionDataConfig, rows: Mapping, left_out: Mapping[str, int], weight: float = 1.0) -> dict:
    """The lineage of the one source that `config` names and `rows` are of: see `mlxmm/storage/lineage.py`.

    A collective call: rank 0 reads. `left_out` are the rows that each condition left out.
    """
    return collectives.broadcast_object(lambda: _describe(config, rows, left_out, weight))


def _describe(config: CaptionDataConfig, rows: Mapping, left_out: Mapping[str, int], weight: float) -> dict:
    train, source = rows["train"], config.only_source
    revision = _commit(config, train) if is_hub_id(source) else None
    return {
        "source": source,
        "config_name": config.only_config_name,
        "revision": revision,
        "fingerprint": _fingerprint(config, train, revision),
        "held_out": _held_out(rows),
        "weight": weight,
        "rows": {split: None if is_stream(part) else len(part) for split, part in rows.items()},
        "where": dict(left_out),
        "captioners": _captioners(train) if isinstance(train, CaptionRows) else [],
        "filters": {} if source == SHAPES else _filters(config, revision),
    } | ({"captions": list(config.captions)} if config.captions else {})


def _commit(config: CaptionDataConfig, train: Rows | StreamRows) -> str | None:
    """The commit that the rows were read at, or, of a stream, that its revision names now."""
    if isinstance(train, CaptionRows) and (commit := commit_of(train.table)):
        return commit
    return dataset_commit(*split_revision(config.only_source, config.revision))


def _fingerprint(config: CaptionDataConfig, train: Rows | StreamRows, commit: str | None) -> str:
    """A checksum of pictures and captions; of a stream, of its commit or of the names and sizes of its files."""
    if isinstance(train, StreamRows):
        files = [] if commit else _files(config.only_source)
        sizes = [f"{path.name} {path.stat().st_size}" for path in files]
        return hashlib.sha256("\n".join([str(commit), *sizes, *config.where]).encode()).hexdigest()
    return (train.checksum() if isinstance(train, CaptionRows) else hashlib.sha256(train.fingerprint()).digest()).hex()


def _held_out(rows: Mapping) -> str:
    """A checksum of the pictures and captions that are not trained on."""
    parts = (part for split, part in rows.items() if split != "train" and isinstance(part, CaptionRows))
    return hashlib.sha256(b"".join(part.checksum() for part in parts)).hexdigest()


def _files(source: str) -> Iterable[Path]:
    paths = Path(source).rglob("*") if Path(source).is_dir() else map(Path, glob.glob(source))
    return sorted(path for path in paths if path.is_file())


def _captioners(rows: CaptionRows) -> list[dict]:
    """Who wrote how many of the captions, most first; empty where the source does not say."""
    facts = rows.caption_facts(CAPTIONER)
    names = ("captioner", "revision", "quantization")
    return [dict(zip(names, who)) | {"captions": number} for who, number in facts.most_common()]


def _filters(config: CaptionDataConfig, commit: str | None) -> dict[str, int]:
    """How many captions each filter dropped when the captions were made, if the source's card says so."""
    source, name = config.only_source, config.only_config_name
    if is_hub_id(source):
        return filters_in_card(dataset_card(split_revision(source, config.revision)[0], commit), name or "default")
    folder = Path(source)
    cards = (folder / "README.md", name or "default"), (folder.parent / "README.md", folder.name)
    found = (filters_in_card(read_text(card), config_name) for card, config_name in cards if card.is_file())
    return next(filter(None, found), {}) if folder.is_dir() else {}
