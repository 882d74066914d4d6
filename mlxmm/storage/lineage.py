"""Lineage: what a module was trained on, source by source, as JSON values.

    {"source": …, "config_name": …, "revision": commit of the Hub, "fingerprint": of the training rows,
     "held_out": fingerprint of the others, "weight": …,
     "rows": by split, "where": training rows that each condition left out,
     "captioners": who wrote how many captions, "filters": captions dropped by each when they were made,
     "captions": the tables that they are from, where the source has not its own}

It is in the checkpoints of a run, and as data.json in its folder and in those of exported models.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import attrs

from mlxmm.errors import UserError
from mlxmm.storage import json_values
from mlxmm.storage.atomic import write_json
from mlxmm.storage.hub import is_hub_id

DATA = "data.json"
FILTERS = re.compile(
    r"^### Filters$(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL
)  # as `export/dataset_card.py` writes them


@attrs.frozen
class Lineage:
    """The data that a module was trained on; empty where that is not known."""

    sources: tuple[dict, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "Lineage":
        """That of a model's folder, or of a checkpoint. Raises `UserError` if the file that says it is damaged."""
        own, checkpoint = folder / DATA, folder / "state.json"
        values = _read(own) if own.is_file() else None
        if not own.is_file() and checkpoint.is_file():
            state = _read(checkpoint)
            data = state.get("datamodule") if isinstance(state, dict) else None
            values = data.get("lineage") if isinstance(data, dict) else None
        is_ours = isinstance(values, list) and all(isinstance(v, dict) and "fingerprint" in v for v in values)
        return cls(tuple(values) if is_ours else ())

    def write(self, folder: Path) -> None:
        """Write data.json, whole or not at all, if anything is known."""
        if self.sources:
            write_json(folder / DATA, self.sources)

    def public(self) -> "Lineage":
        """As it may be published: of a local path its last part alone."""
        return Lineage(tuple(one | {"source": _public(one["source"])} | _public_captions(one) for one in self.sources))


def _read(path: Path):
    try:
        return json_values.read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _public(name: str) -> str:
    return name if is_hub_id(name) else Path(name).name


def _public_captions(source: dict) -> dict:
    return {"captions": [_public(name) for name in source["captions"]]} if "captions" in source else {}


def changes(old: Sequence[dict], new: Sequence[dict]) -> str:
    """What is trained on now that was not trained on before, in words; empty if nothing changed."""
    if len(old) != len(new):
        return f"it was trained on {_names(old)}, now on {_names(new)}"
    return "; ".join(filter(None, map(_change, old, new)))


def require_unchanged(old: Sequence[dict], new: Sequence[dict]) -> None:
    """Raise `UserError` that says what is trained on now that was not trained on before."""
    if changed := changes(old, new):
        raise UserError(
            f"the training data changed: {changed}. Bring them back, or start a new run from this one's weights"
        )


def held_out_changes(old: Sequence[dict], new: Sequence[dict]) -> str:
    """What is measured on now that was not measured on before, in words; empty if nothing changed."""
    pairs = [
        (one, other) for one, other in zip(old, new) if one.get("held_out", other["held_out"]) != other["held_out"]
    ]
    return "; ".join(f"{new['source']} gave {_sizes(old)}, and gives {_sizes(new)}" for old, new in pairs)


def _sizes(source: dict) -> str:
    rows = [f"{number} {split} rows" for split, number in source["rows"].items() if split != "train"]
    return f"{' and '.join(rows)} ({source['held_out'][:8]})"


def _change(old: dict, new: dict) -> str:
    name, before, now = new["source"], old["rows"]["train"], new["rows"]["train"]
    if before != now:
        return f"{name} gave {before} training rows, and gives {now}"
    if old["weight"] != new["weight"]:
        return f"{name} had the weight {old['weight']:g}, and has {new['weight']:g}"
    if old["fingerprint"] != new["fingerprint"]:
        return f"{name} has other pictures or captions than before"
    return ""


def _names(sources: Sequence[dict]) -> str:
    return " and ".join(one["source"] for one in sources)


def filters_in_card(card: str, config_name: str) -> dict[str, int]:
    """How many captions each filter dropped, as the card of a data set of captions says of one configuration."""
    sections = re.split(r"^## Configuration ", card, flags=re.MULTILINE)
    section = next((text for text in sections if text.startswith(f"`{config_name}`")), "")
    table = found[1] if (found := FILTERS.search(section)) else ""
    return {name: int(count) for name, count in re.findall(r"^\| (\w+) \| (\d+) \|$", table, re.MULTILINE)}
