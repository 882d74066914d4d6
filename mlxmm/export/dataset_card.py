"""The card of a data set of captions: the README.md of its folder, its metadata first."""

import json
from collections import Counter
from collections.abc import Mapping

import attrs

from mlxmm.escaping import markdown
from mlxmm.storage.dataset_push import CONFIG_SECTION
from mlxmm.storage.hub import dataset_metadata, is_hub_id, split_revision

NUM_SAMPLES = 8
TOTALS = ("captions", "kept", "stripped")  # counts of `apply_filters` that are of no filter
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
CARD = """\
{metadata}
# {title}

Captions of pictures, written by models and not by people. Each caption has the model that wrote it, its revision,
prompt and sampling. Captions that a filter dropped are kept in a configuration of their own, with the reason.

{section} `{config}`

{licence} {pictures}

| | |
| --- | --- |
{provenance}

### Filters

A caption may be dropped by several filters.

| filter | captions it dropped |
| --- | --- |
{counts}

### Samples

| caption | prompt | captioner | picture |
| --- | --- | --- | --- |
{samples}
"""
NO_LICENCE = "The licence of pictures and captions is not known."
INCLUDED = "The pictures are included."
JOIN = """\
The pictures are not included. They are those of the source, found by the SHA-256 of their files:

```python
import hashlib

from datasets import Image, load_dataset

captions = load_dataset("NAME_OF_THIS_DATA_SET", "{config}", split="{split}")
source = load_dataset("NAME_OF_THE_SOURCE", split="{split}").cast_column("image", Image(decode=False))
places = {{hashlib.sha256(row["image"]["bytes"]).hexdigest(): place for place, row in enumerate(source)}}
pairs = [(source[places[row["image_sha256"]]]["image"], row["caption"]) for row in captions]
```"""


@attrs.frozen(kw_only=True)
class CardFacts:
    """What a card says that the captions themselves do not."""

    title: str = "Synthetic captions"
    language: tuple[str, ...] = ("en",)  # ISO 639-1
    licence: str | None = None  # identifier on the Hub, as cc-by-4.0; None: not known
    counts: Mapping[str, int] = attrs.field(factory=dict)  # of `apply_filters`: how many captions each dropped


@attrs.define
class Tally:
    """What the rows of a data set are, counted while they are written."""

    num_pictures: int = 0
    num_captions: int = 0
    num_dropped: int = 0
    num_stripped: int = 0
    sources: Counter = attrs.field(factory=Counter)  # facts of pictures, and of captions below
    writers: Counter = attrs.field(factory=Counter)
    samples: list[tuple[str, str, str, str]] = attrs.field(factory=list)

    def add(self, picture) -> None:
        """Count a `PictureRecord`."""
        kept = [caption.values() for caption in picture.captions if not caption.flags]
        self.num_dropped += len(picture.captions) - len(kept)
        self.num_captions += len(kept)
        self.num_stripped += sum(bool(one["stripped"]) for one in kept)
        if not kept:
            return
        self.num_pictures += 1
        values = picture.values()
        self.sources[values["source"], values["source_split"], values["source_revision"]] += 1
        for one in kept:
            facts = (
                one["captioner"],
                one["captioner_revision"],
                one["quantization"],
                one["prompt_id"],
                one["sampling"],
            )
            self.writers[facts] += 1
        if len(self.samples) < NUM_SAMPLES:
            first = kept[0]
            self.samples.append((first["caption"], first["prompt_id"], first["captioner"], picture.sha256[:12]))


def dataset_card(tally: Tally, facts: CardFacts, splits: Mapping[str, list[str]], *, include_images: bool) -> str:
    """The card of a folder whose configurations have these splits: first that of kept captions."""
    config, *_ = splits
    split = splits[config][0]
    return CARD.format(
        section=CONFIG_SECTION,
        metadata=_metadata(tally, facts, splits),
        title=markdown(facts.title),
        licence=f"Licence: {markdown(facts.licence)}."
        if facts.licence
        else "The licence of pictures and captions is not known.",
        config=config,
        pictures=INCLUDED if include_images else JOIN.format(config=config, split=split),
        provenance=_rows(_provenance(tally)),
        counts=_rows((name, count) for name, count in facts.counts.items() if name not in TOTALS),
        samples=_rows(tally.samples),
    )


def _metadata(tally: Tally, facts: CardFacts, splits: Mapping[str, list[str]]) -> str:
    sources = sorted({split_revision(source)[0] for source, *_ in tally.sources if is_hub_id(source)})
    return dataset_metadata(
        language=list(facts.language),
        license=facts.licence or "unknown",
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        size_categories=[size_category(tally.num_pictures)],
        source_datasets=sources or None,
        task_categories=["image-to-text"],
        tags=["synthetic", "image-captioning", "mlxmm"],
        configs=[
            _config(name, names, is_first=not place) for place, (name, names) in enumerate(splits.items()) if names
        ],
    )


def _config(name: str, splits: list[str], is_first: bool) -> dict:
    files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in splits]
    is_default = {"default": True} if is_first and name != "default" else {}  # what is read where no name is given
    return {"config_name": name, "data_files": files} | is_default


def size_category(num_rows: int) -> str:
    """The category of the Hub: n<1K, 1K<n<10K, …"""
    place = max(0, len(str(num_rows)) - 3)
    if place == 0:
        return "n<1K"
    return f"{SIZES[place - 1]}<n<{SIZES[place]}" if place < len(SIZES) else f"n>{SIZES[-1]}"


def _provenance(tally: Tally) -> list[tuple]:
    rows: list[tuple] = [("pictures", tally.num_pictures), ("captions", tally.num_captions)]
    rows.append(("captions dropped", tally.num_dropped))
    rows.append(("captions stripped of boilerplate", tally.num_stripped))
    for (source, split, revision), count in sorted(tally.sources.items(), key=str):
        rows.append(("source", f"{source}, split {split}, revision {revision or 'not known'}: {count} pictures"))
    for (captioner, revision, quantization, prompt, sampling), count in sorted(tally.writers.items(), key=str):
        about = f"{captioner}, revision {revision}, quantization {quantization or 'none'}, prompt {prompt}"
        drawn = ", ".join(f"{name} {value}" for name, value in json.loads(sampling).items())
        rows.append(("captioner", f"{about}, {drawn}: {count} captions"))
    return rows


def _rows(rows) -> str:
    """Rows of a table of Markdown."""
    return "\n".join(f"| {' | '.join(map(markdown, row))} |" for row in rows)
