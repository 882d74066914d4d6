"""Look at data before training on them: splits, captions, pictures, what is broken, what is there twice.

    python -m recipes.look_at_data pictures.parquet
    python -m recipes.look_at_data FOLDER --data.captions captions.jsonl --tokenizer openai/clip-vit-base-patch32

Every picture is decoded. The report is printed and written to report.txt, with samples.png beside it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
from attrs.validators import ge

from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, option, positional, section
from mlxmm.data.caption_config import CaptionDataConfig
from mlxmm.data.overview import Overview, five_numbers, look_at, meaningless, shared
from mlxmm.data.splits import open_splits
from mlxmm.errors import UserError
from mlxmm.evaluation.contact_sheet import Section, contact_sheet
from mlxmm.preprocessing.tokenizers import load_tokenizer
from mlxmm.storage.atomic import atomic_file, write_text
from mlxmm.storage.hub import settings_folder
from mlxmm.storage.runs import RunConfig, open_run

MAX_NAMED = 3  # rows named of each fault
LEGEND = "above: the first caption of each picture; below it: its second"


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config(RunConfig):
    """Data, and how much of them is shown."""

    sources: tuple[str, ...] = positional((), "what is looked at, in place of --data.source")
    run_dir: Path | None = option(
        None, "new folder of the report; none: runs/look_at_data/<date and time>", flag="--to", first=True
    )
    tokenizer: str | None = option(
        None, "folder or Hub id of a tokenizer that counts tokens; none: words only", first=True
    )
    samples: int = option(8, "captions and pictures shown of each split", ge(1), first=True)
    data: CaptionDataConfig = section(CaptionDataConfig(), without=("random_crop", "shuffle_buffer", "weights"))


def main(config: Config) -> None:
    data = attrs.evolve(config.data, source=config.sources) if config.sources else config.data
    if data.streaming:
        raise UserError("a stream is not looked at, as it has no end that is known: leave out --data.streaming")
    with open_run(config, "look_at_data") as run:
        sources = open_splits(data, config.seed, checked=False, to_train=False)
        opened = {one.only_source: own.rows for one, own in zip(data.each(), sources)}
        looked = {name: _look(rows, data.num_decoding_threads) for name, rows in opened.items()}
        lines = [line for name, splits in looked.items() for line in report(name, splits, config, data.batch_size)]
        run.print("\n".join(lines))
        write_text(run.folder / "report.txt", "\n".join(lines) + "\n")
        with atomic_file(run.folder / "samples.png") as path:
            contact_sheet(_samples(opened, looked, config.samples), legend=LEGEND).save(path)
        run.report({f"{split}/pictures": len(one.names) for splits in looked.values() for split, one in splits.items()})


def _look(rows: Mapping, num_threads: int) -> dict[str, Overview]:
    return {split: look_at(part, num_threads) for split, part in rows.items()}


def report(name: str, splits: Mapping[str, Overview], config: Config, batch_size: int) -> list[str]:
    """The lines about one source: each split, what splits share, and warnings."""
    tokenizer = None if config.tokenizer is None else load_tokenizer(settings_folder(config.tokenizer))
    lines = [f"{name}: {sum(len(one.names) for one in splits.values())} rows"]
    for split, overview in splits.items():
        lines += [f"  {split}:", *(f"    {line}" for line in _about(overview, tokenizer, config.samples))]
    num_rows = {split: len(set(one.hashes)) for split, one in splits.items()}
    warnings = meaningless(num_rows, batch_size) + shared({split: one.hashes for split, one in splits.items()})
    return [*lines, *(f"  warning: {line}" for line in warnings)]


def _about(overview: Overview, tokenizer, most: int) -> Iterator[str]:
    texts = [text for captions in overview.captions for text in captions]
    yield f"{len(overview.names)} rows, {len(set(overview.hashes))} different pictures, {len(texts)} captions"
    if overview.names:
        yield f"captions of a row: {five_numbers(list(map(len, overview.captions)))}"
    if texts:
        yield f"words of a caption: {five_numbers([len(text.split()) for text in texts])}; {len(set(texts))} different"
    if texts and tokenizer is not None:
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        yield f"tokens of a caption: {five_numbers(list(map(len, tokens)))}"
    if sizes := [size for size in overview.sizes if size is not None]:
        widths, heights = zip(*sizes)
        yield f"pixels: width {five_numbers(widths)}; height {five_numbers(heights)}"
    yield from _fault("pictures cannot be decoded", overview.broken)
    yield from _fault("rows have no caption", overview.captionless)
    yield from _fault("pictures have several rows", [" = ".join(names[:MAX_NAMED]) for names in overview.copies])
    yield from (f"- {text}" for text in texts[:most])


def _fault(fault: str, names: list[str]) -> Iterator[str]:
    if names:
        yield f"{len(names)} {fault}: {', '.join(names[:MAX_NAMED])}{', …' if len(names) > MAX_NAMED else ''}"


def _samples(opened: Mapping, looked: Mapping, most: int) -> Iterator[Section]:
    """The first rows of each split that have a picture and a caption."""
    for name, splits in looked.items():
        for split, one in splits.items():
            good = [i for i, size in enumerate(one.sizes) if size is not None and one.captions[i]][:most]
            said = [(*one.captions[i][1:2], "")[0] for i in good]
            yield Section(f"{name}: {split}", [opened[name][split][i] for i in good], said)


if __name__ == "__main__":
    run_recipe("look_at_data", main, {"default": Preset("", Config())})
