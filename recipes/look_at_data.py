"""Look at data before training on them: splits, captions, pictures, what is broken, what is there twice.

    python -m recipes.look_at_data pictures.parquet
    python -m recipes.look_at_data FOLDER --data.captions captions.jsonl --tokenizer openai/clip-vit-base-patch32

Every picture is decoded. The report is printed and written to report.txt, with samples.png beside it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import numpy as np
from attrs.validators import ge
from PIL import Image

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
from mlxmm.terminal import counted

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
            contact_sheet(_samples(opened, looked, config), legend=LEGEND).save(path)
        run.print(f"report: {run.folder / 'report.txt'}")
        run.report({f"{split}/pictures": len(one.names) for splits in looked.values() for split, one in splits.items()})


def _look(rows: Mapping, num_threads: int) -> dict[str, Overview]:
    return {split: look_at(part, num_threads) for split, part in rows.items()}


def report(name: str, splits: Mapping[str, Overview], config: Config, batch_size: int) -> list[str]:
    """The lines about one source: each split, what splits share, and warnings."""
    tokenizer = None if config.tokenizer is None else load_tokenizer(settings_folder(config.tokenizer))
    lines = [f"{name}: {counted(sum(len(one.names) for one in splits.values()), 'row')}"]
    for split, overview in splits.items():
        lines += [f"  {split}:", *(f"    {line}" for line in _about(overview, tokenizer, config))]
    num_rows = {split: len(set(one.hashes)) for split, one in splits.items()}
    warnings = meaningless(num_rows, batch_size) + shared({split: one.hashes for split, one in splits.items()})
    return [*lines, *(f"  warning: {line}" for line in warnings)]


def _about(overview: Overview, tokenizer, config: Config) -> Iterator[str]:
    texts = [text for captions in overview.captions for text in captions]
    num_pictures = counted(len(set(overview.hashes)), "different picture")
    yield f"{counted(len(overview.names), 'row')}, {num_pictures}, {counted(len(texts), 'caption')}"
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
    yield from _fault("picture", "that cannot be decoded", overview.broken)
    yield from _fault("row", "without a caption", overview.captionless)
    yield from _fault("picture", "with several rows", [" = ".join(names[:MAX_NAMED]) for names in overview.copies])
    yield from (f"- {overview.captions[i][0]}" for i in sampled(overview, config))


def _fault(noun: str, fault: str, names: list[str]) -> Iterator[str]:
    if names:
        more = ", …" if len(names) > MAX_NAMED else ""
        yield f"{counted(len(names), noun)} {fault}: {', '.join(names[:MAX_NAMED])}{more}"


def sampled(overview: Overview, config: Config) -> list[int]:
    """Places of rows that have a picture and a caption, drawn from the whole split: the first ones are often alike."""
    good = [i for i, size in enumerate(overview.sizes) if size is not None and overview.captions[i]]
    order = np.random.default_rng(config.seed).permutation(len(good))[: config.samples]
    return [good[i] for i in sorted(order)]


def _samples(opened: Mapping, looked: Mapping, config: Config) -> Iterator[Section]:
    """Rows of each split that are drawn from all of it, then those whose pictures are broken, by their names."""
    for name, splits in looked.items():
        for split, one in splits.items():
            places = sampled(one, config)
            said = [(*one.captions[i][1:2], "")[0] for i in places]
            yield Section(f"{name}: {split}", [opened[name][split][i] for i in places], said)
            blank = Image.new("RGB", (8, 8), "lightgray")
            broken = [{"image": blank, "captions": [row]} for row in one.broken[: config.samples]]
            yield Section(f"{name}: {split}, cannot be decoded", broken, [""] * len(broken))


if __name__ == "__main__":
    run_recipe("look_at_data", main, {"default": Preset("", Config())})
