"""Write captions of pictures, into a journal that survives whatever happens.

    python -m recipes.write_captions --captioner.model runs/align_qwen3/mine/checkpoints/best \\
        --data.source FOLDER
    python -m recipes.write_captions --run-dir runs/write_captions/mine --resume last

Stop it at any moment: with `--resume last` it goes on, and asks for no caption twice beyond the batch in hand. `--shard
3/16` writes every sixteenth picture, so that many machines share the work; `recipes.merge_captions` joins the shards.
"""

from collections.abc import Mapping

import attrs

from mlxmm.captioners.caption_writer import CaptionWriter, WriterFailed
from mlxmm.captioners.job import Progress, Shard, hashes_of, journal_name, requests, write_captions
from mlxmm.captioners.journal import Entry, Journal
from mlxmm.captioners.prompts import find_prompts
from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, option
from mlxmm.data.pictures import ALL, Pictures, open_split
from mlxmm.errors import UserError
from mlxmm.progress_bar import progress_bar
from mlxmm.storage.runs import Run, TrainingRunConfig, model_of, open_run
from mlxmm.terminal import counted

from .parts.captioners import JobConfig, check_captioner, open_captioner, provenance, with_prompts
from .parts.publishing import Captions, DatasetConfig, check_dataset, make_dataset

MAX_NAMED = 5  # captions that could not be written


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config(TrainingRunConfig, JobConfig, DatasetConfig):
    """Pictures, who writes, what is asked, and what becomes of it."""

    shard: str | None = option(
        None, "share of the pictures, as 3/16; none: that of this rank or Slurm task, or all of them", first=True
    )


def main(config: Config) -> None:
    config.data.require_one_source()
    config, shard = with_shard(with_prompts(with_model(config)))
    prompts = find_prompts(config.prompts or ("describe",), config.own_prompts)
    with open_run(config, "write_captions") as run:
        check_captioner(config.captioner)
        check_dataset(config, config.split)
        pictures, split = open_split(config.data, config.seed, config.split, only_missing=config.only_missing)
        config = attrs.evolve(config, split=split)
        writer = open_captioner(config.captioner, config.data, config.seed, config.split)
        try:
            captions = write(config, run, pictures, prompts, shard, writer)
        finally:
            writer.close()
        if shard == Shard():  # shards become a data set when they are merged
            make_dataset(config, config, config.seed, captions, run)


def with_model(config: Config) -> Config:
    """The config with the checkpoint of the run that it names as the captioner. Without a split, a filter that compares
    with val and test takes train."""
    is_compared = config.split is None and config.filters.min_hash_distance is not None
    config = attrs.evolve(config, split="train" if is_compared else config.split)
    if config.captioner.model is None or config.captioner.url:
        return config
    return attrs.evolve(config, captioner=attrs.evolve(config.captioner, model=model_of(config.captioner.model)))


def with_shard(config: Config) -> tuple[Config, Shard]:
    """The config of this process, whose folder says its shard to a resumed run and to merge_captions.

    Ranks and tasks are given one `--run-dir`, below which each has a folder of its own.
    """
    own = Shard.own()
    if config.shard is not None:
        return config, Shard.parse(config.shard)
    if own.count > 1:
        if config.run_dir is None:
            raise UserError("--run-dir is missing: the shards of ranks or tasks lie below one folder")
        config = attrs.evolve(config, run_dir=config.run_dir / f"shard-{own.number}-of-{own.count}")
    return attrs.evolve(config, shard=str(own)), own


def write(config: Config, run: Run, pictures, prompts: dict, shard: Shard, writer: CaptionWriter) -> Captions:
    """Write what is missing, and report what the journal holds at the end."""
    path = run.folder / journal_name(shard)
    journal = Journal(path, writer=writer.name, revision=writer.revision, sampling=config.sampling)
    try:
        hashes = hashes_of(pictures, shard)
        wanted = requests(hashes, prompts, journal.written())
        of_split = f" of {config.split}" if config.split != ALL else ""
        kind = f"{counted(len(hashes), 'picture')}{of_split}{' without a caption' * config.only_missing}"
        counts = f"{kind}, {counted(len(hashes) * len(prompts), 'caption')}"
        run.print(f"{counts}, {len(wanted)} of them to be written")
        if shard == Shard() and len(hashes) < len(pictures):
            run.print(f"{len(pictures) - len(hashes):,} more, equal to one of these, are captioned with it")
        with progress_bar("captions", len(wanted), "caption", shown=bool(wanted)) as bar:
            progress = write_captions(pictures, wanted, prompts, writer, journal, config.sampling, shown_on(bar))
        entries = list(journal.entries())
    except WriterFailed as error:
        raise UserError(f"{writer.name} writes no more captions: {error}; --resume last goes on from here") from None
    finally:
        journal.close()
    num_failed = report_failures([entry for entry in entries if entry.reason], pictures, hashes, run)
    run.report({"pictures": len(hashes), "captions": len(entries) - num_failed, "failed": num_failed})
    run.report(progress.rates())
    run.save()
    return Captions(entries, pictures, hashes, provenance(writer, config.sampling))


def report_failures(failed: list[Entry], pictures: Pictures, hashes: Mapping[str, int], run: Run) -> int:
    """Print what could not be captioned, and why; returns how many captions that are."""
    for entry in failed[:MAX_NAMED]:
        name = pictures.name(hashes[entry.image]) if entry.image in hashes else entry.image
        run.print(f"failed, {name}: {entry.reason}")
    if len(failed) > MAX_NAMED:
        run.print(f"failed, and {counted(len(failed) - MAX_NAMED, 'caption')} more")
    return len(failed)


def shown_on(bar):
    """Shows on a bar which captions are written, with rates and the time that is left."""

    def update(progress: Progress) -> None:
        bar.set_postfix({name: f"{value:.1f}" for name, value in progress.rates().items()}, refresh=False)
        bar.update(progress.num_captions + progress.num_failed - bar.n)

    return update


if __name__ == "__main__":
    run_recipe("write_captions", main, {"default": Preset("", Config())})
