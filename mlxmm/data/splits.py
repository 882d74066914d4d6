"""The rows of each split of each source, without those that conditions leave out or that cannot be used."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from mlxmm.data.caption_config import SHAPES, CaptionDataConfig
from mlxmm.data.sources.joined import Join
from mlxmm.data.sources.opening import open_rows, open_training_rows, unlisted_pictures
from mlxmm.data.sources.rows import MAX_UNUSABLE, NUM_TOLERATED, CaptionRows
from mlxmm.data.sources.shapes import ShapesGrammar
from mlxmm.data.sources.stream import open_stream
from mlxmm.data.sources.tables import Columns, read_captions
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.terminal import counted, say

MAX_NAMED = 5  # pictures of a kind


@attrs.frozen
class OpenedSource:
    """The rows of one source by split, the names of those that cannot be used, and how many training rows each
    condition left out."""

    rows: dict[str, Any]
    skipped: list[str]
    left_out: dict[str, int]


def open_splits(
    config: CaptionDataConfig, seed: int, *, checked: bool = True, to_train: bool = True
) -> list[OpenedSource]:
    """Each source that `config` names: the first with all its splits, the others with their training rows.

    Unless it is `to_train`, the first may lack some. With `checked`, rows without a caption or with a broken picture
    are left out. A collective call. Raises `UserError` where a source, a column or a split is missing or damaged.
    """
    if config.captions and SHAPES in config.source:
        raise UserError("--data.captions is for pictures with files, not for `shapes`")
    configs = config.each()
    captions = read_captions(config.captions, " ".join(config.caption_column))
    join = Join(captions, config.captions, config.num_decoding_threads) if captions else None
    opened = [_open(one, seed, join, is_first=not place, to_train=to_train) for place, one in enumerate(configs)]
    _check_conditions(config, opened)
    if all(isinstance(part, CaptionRows) for part in opened[0].values()) and join is None:
        _report_unlisted(config.source[0], opened[0])
    return [_usable(one, rows, checked) for one, rows in zip(configs, opened)]


def _open(config: CaptionDataConfig, seed: int, join: Join | None, *, is_first: bool, to_train: bool) -> dict[str, Any]:
    """The rows of each split of one source; of one beside the first those of training alone."""
    columns = Columns(image=config.image_column, caption=" ".join(config.caption_column), split=config.split_column)
    source, which = config.only_source, config.which
    if source == SHAPES:
        rows: dict[str, Any] = ShapesGrammar(config.shapes, seed).rows(seed)
        return rows if is_first else {"train": rows["train"]}
    if config.streaming:
        held_out, conditions = config.held_out, config.conditions
        return open_stream(source, columns, num_held_out=held_out, conditions=conditions, to_train=to_train, **which)
    if is_first:
        return open_rows(source, columns, seed=seed, join=join, to_train=to_train, **which)
    return {"train": open_training_rows(source, columns, seed=seed, join=join, **which)}


def _check_conditions(config: CaptionDataConfig, opened: Sequence[dict[str, Any]]) -> None:
    """Raise `UserError` where a condition is on a column that no source has."""
    tables = [getattr(part, "table", None) for rows in opened for part in rows.values()]
    names = list(dict.fromkeys(name for table in tables if table is not None for name in table.column_names or ()))
    for condition in config.conditions:
        if condition.column not in names:
            raise UserError(
                f"--data.where {condition}: no source has that column; there are {', '.join(names) or 'none'}"
            )


def _usable(config: CaptionDataConfig, opened: dict[str, Any], checked: bool) -> OpenedSource:
    usable, left_out = dict(opened), {}
    for split, part in opened.items():
        if isinstance(part, CaptionRows):  # not drawn; nor a stream, whose rows are checked as they are read
            usable[split], not_met = part.where(config.conditions)
            _report_conditions(config.only_source, split, len(part), len(usable[split]), not_met)
            left_out = not_met if split == "train" else left_out
    if not checked:
        return OpenedSource(usable, [], left_out)
    captionless = _leave_out(usable, "rows without a caption", CaptionRows.without_captionless)
    _report_skipped("has no caption", captionless)
    readable = lambda rows: rows.without_undecodable(config.num_decoding_threads)
    undecodable = _leave_out(usable, "pictures cannot be decoded", readable)
    _report_skipped("cannot be decoded", undecodable)
    return OpenedSource(usable, captionless + undecodable, left_out)


def _leave_out(rows: dict[str, Any], fault: str, without: Callable) -> list[str]:
    """Take what cannot be used out of `rows`, which are the splits of one source, and return the names of it.

    Raises `UserError` that names the first five, if they are more than `NUM_TOLERATED` and more than one in a hundred
    rows of the source (a split of six may lose one), half of it, or all of a split.
    """
    parts = {split: part for split, part in rows.items() if isinstance(part, CaptionRows)}
    kept = {split: without(part) for split, part in parts.items()}
    names, num_rows = [name for _, own in kept.values() for name in own], sum(map(len, parts.values()))
    emptied = [split for split, (part, own) in kept.items() if own and not len(part)]
    much = _too_many(len(names), num_rows) or (f"all of {emptied[0]}" if emptied else "")
    if much:
        raise UserError(
            f"{len(names)} of {num_rows} {fault}, {much}; fix them or leave them out: {', '.join(names[:5])}"
        )
    rows |= {split: part for split, (part, _) in kept.items()}
    return names


def _too_many(num_unusable: int, num_rows: int) -> str:
    """Why so many unusable rows are too many; empty if they are not."""
    if 0 < num_rows <= 2 * num_unusable:
        return "half of them or more"
    is_much = num_unusable > max(NUM_TOLERATED, MAX_UNUSABLE * num_rows)
    return f"more than one in a hundred and more than {NUM_TOLERATED}" if is_much else ""


def _report_conditions(source: str, split: str, num_before: int, num_rows: int, left_out: dict[str, int]) -> None:
    """Print how many rows each condition left out. Raises `UserError` if no row is left."""
    for condition, number in left_out.items() if collectives.rank() == 0 else ():
        say(f"--data.where {condition} leaves out {number} of {num_before} {split} rows of {source}")
    if left_out and not num_rows:
        raise UserError(f"--data.where {' '.join(left_out)} leaves no {split} rows of {source}")


def _report_unlisted(source: str, rows: dict[str, CaptionRows]) -> None:
    tables, columns = [part.table for part in rows.values()], next(iter(rows.values())).columns
    if unlisted := unlisted_pictures(Path(source), tables, columns.image):
        first = ", ".join(map(str, unlisted[:MAX_NAMED])) + ", …" * (len(unlisted) > MAX_NAMED)
        num_texts = sum(path.with_suffix(".txt").is_file() for path in unlisted)
        texts = (
            f"; {num_texts} of them have a .txt, which is read only where there are no metadata" if num_texts else ""
        )
        _report_skipped(f"{counted(len(unlisted), 'picture')} that the metadata do not name", [first + texts])


def _report_skipped(why: str, names: Sequence[str]) -> None:
    for name in names if collectives.rank() == 0 else ():
        say(f"skipped, {why}: {name}")
