"""From a journal of captions to a data set, filtered, in the folder of a run and on the Hub."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
from PIL import Image

from mlxmm.captioners.filters import FilterConfig, Verdict, apply_filters, check_filters
from mlxmm.captioners.journal import Entry
from mlxmm.captioners.prompts import first_sentence
from mlxmm.captioners.records import Provenance, candidates, caption_records
from mlxmm.config import checked, option, section
from mlxmm.data.caption_source import CaptionDataConfig
from mlxmm.data.pictures import ALL, Pictures, open_pictures
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.export.dataset import PictureRecord, check_config_name, write_dataset
from mlxmm.export.dataset_card import CardFacts
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.preprocessing.images import UndecodableImage
from mlxmm.storage.dataset_push import push_dataset
from mlxmm.storage.hub import check_upload
from mlxmm.storage.runs import Run

from .captioners import JobConfig
from .named_parts import check_parts


@attrs.frozen(kw_only=True, slots=False, field_transformer=checked)  # recipes derive their Config from this and another
class DatasetConfig:
    """What becomes of the captions."""

    filters: FilterConfig = section(FilterConfig())
    first_sentence: bool = option(False, "take the first sentence of each caption")
    include_images: bool = option(False, "put the pictures into the data set: only if you may publish them")
    config_name: str = option("default", "name of the data set's configuration; a later one is refresh-2, for example")
    licence: str | None = option(None, "licence of the captions, as cc-by-4.0; none: it is said to be unknown")
    language: str = option("en", "language of the captions, as en")
    push_to: str | None = option(None, "data set on the Hub, user/name, to push to; created if missing", first=True)
    public: bool = option(False, "make the data set that --push-to creates public")


def check_dataset(config: DatasetConfig, split: str | None) -> None:
    """Raise `UserError`, before anything is written, where the settings cannot be met."""
    if config.filters.min_hash_distance is not None and split == ALL:
        raise UserError("--filters.min-hash-distance compares with val and test: name another --split")
    check_filters(config.filters)
    check_config_name(config.config_name)
    check_parts(clip=config.filters.clip)
    if config.push_to and collectives.rank() == 0:
        check_upload(config.push_to)


@attrs.frozen
class Captions:
    """What was written: the entries of a journal, their pictures, and by whom."""

    entries: Sequence[Entry]
    pictures: Pictures
    places: Mapping[str, int]  # of the pictures, by the SHA-256 of their files
    provenance: Provenance


@attrs.frozen
class Origin:
    """Where the pictures come from, as a data set says it."""

    source: str
    split: str
    revision: str | None = None


def make_dataset(config: DatasetConfig, job: JobConfig, seed: int, captions: Captions, run: Run) -> None:
    """Write `dataset/` into the run's folder; report what it holds and what filters dropped; push it if asked."""
    clip = None if config.filters.clip is None else ContrastiveCLIP.from_pretrained(config.filters.clip)
    verdicts, counts = judge(config, captions, clip, _held_out(job.data, seed, config.filters))
    folder = run.folder / "dataset"
    origin = Origin(job.data.only_source, "train" if job.split == ALL else job.split, job.data.revision)
    sizes = write_folder(config, captions, origin, verdicts, counts, folder)
    run.report({f"dataset/{name}": number for name, number in sizes.items()})
    run.report({f"filters/{name}": number for name, number in counts.items()})
    run.save()
    if config.push_to:
        run.print(f"pushed: {push_dataset(folder, config.push_to, config.config_name, public=config.public)}")


def judge(
    config: DatasetConfig, captions: Captions, clip: ContrastiveCLIP | None, held_out: Iterable[Image.Image]
) -> tuple[list[Verdict], dict[str, int]]:
    """What the filters make of each caption, and counts; `held_out` are the pictures of the evaluation splits."""
    texts = first_sentence if config.first_sentence else str.strip
    shown = [attrs.evolve(entry, text=texts(entry.text)) for entry in captions.entries]
    images = lambda sha256: captions.pictures[captions.places[sha256]]
    return apply_filters(candidates(shown), config.filters, images=images, clip=clip, evaluation_images=held_out)


def write_folder(
    config: DatasetConfig,
    captions: Captions,
    origin: Origin,
    verdicts: Sequence[Verdict],
    counts: Mapping[str, int],
    folder: Path,
) -> dict[str, int]:
    """Write the data set into `folder`, in place of what is there; return how many pictures and captions it has."""
    records = caption_records(captions.entries, verdicts, captions.provenance)
    shutil.rmtree(folder, ignore_errors=True)  # of this run, before it was resumed
    facts = CardFacts(language=(config.language,), licence=config.licence, counts=counts)
    rows = (_picture(config, origin, captions, sha256, own) for sha256, own in records.items())
    return write_dataset(folder, rows, facts, include_images=config.include_images, config_name=config.config_name)


def _held_out(data: CaptionDataConfig, seed: int, filters: FilterConfig) -> Iterator[Image.Image]:
    """The pictures of the evaluation splits, if a filter compares with them."""
    if filters.min_hash_distance is None:
        return
    for split in ("val", "test"):
        pictures = open_pictures(data, seed, split)
        for place in range(len(pictures)):
            with contextlib.suppress(UndecodableImage):
                yield pictures[place]


def _picture(config: DatasetConfig, origin: Origin, captions: Captions, sha256: str, own: Sequence) -> PictureRecord:
    place, is_read = captions.places[sha256], any(not caption.flags for caption in own)
    width, height = captions.pictures[place].size if is_read else (0, 0)
    return PictureRecord(
        sha256=sha256,
        width=width,
        height=height,
        source=origin.source,
        source_split=origin.split,
        source_revision=origin.revision,
        row_id=captions.pictures.name(place),
        identity=captions.pictures.identity(place),
        captions=own,
        image=captions.pictures.file(place) if config.include_images else None,
    )
