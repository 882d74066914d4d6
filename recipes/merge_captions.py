"""Join the shards of a captioning job into one journal, and prove that no caption is missing or there twice.

python -m recipes.merge_captions runs/write_captions/one runs/write_captions/two --run-dir runs/merged
"""

from pathlib import Path

import attrs

from mlxmm.captioners.job import Shard, hashes_of, journal_name, requests
from mlxmm.captioners.journal import Journal, identity_of
from mlxmm.captioners.prompts import find_prompts
from mlxmm.captioners.records import Provenance
from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, from_json, positional
from mlxmm.data.pictures import open_split
from mlxmm.errors import UserError
from mlxmm.storage.pretrained import read_json
from mlxmm.storage.runs import RunConfig, open_run

from .parts.captioners import JobConfig
from .parts.publishing import Captions, DatasetConfig, check_dataset, make_dataset

OF_A_JOB = [field.name for field in attrs.fields(JobConfig)] + ["seed"]  # what its shards have in common


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config(RunConfig, DatasetConfig):
    """The shards, and what becomes of their captions."""

    runs: tuple[Path, ...] = positional((), "folders of write_captions, one for each shard")


def main(config: Config) -> None:
    shards, job, seed = read_shards(config.runs)
    writer, revision, sampling = same(
        [identity_of(folder / journal_name(shard)) for folder, shard in shards.items()], "writers or samplings"
    )
    with open_run(config, "merge_captions") as run:
        check_dataset(config, job.split)
        journal = Journal(run.folder / journal_name(Shard()), writer=writer, revision=revision, sampling=sampling)
        try:
            for folder, shard in shards.items():
                journal.take_in(folder / journal_name(shard))
            pictures, split = open_split(job.data, seed, job.split, only_missing=job.only_missing)
            hashes = hashes_of(pictures, Shard())
            missing = requests(hashes, find_prompts(job.prompts, job.own_prompts), journal.written())
            entries = list(journal.entries())
        finally:
            journal.close()
        if missing:
            raise UserError(f"{len(missing)} captions are missing: resume the shards that were not finished")
        run.report({"pictures": len(hashes), "captions": sum(not entry.reason for entry in entries)})
        by = Provenance(captioner=writer, captioner_revision=revision, sampling=sampling)
        make_dataset(config, attrs.evolve(job, split=split), seed, Captions(entries, pictures, hashes, by), run)


def read_shards(folders: tuple[Path, ...]) -> tuple[dict[Path, Shard], JobConfig, int]:
    """The shard of each folder, and the job and seed that they share. Raises `UserError` if one is missing."""
    if not folders:
        raise UserError("name the folders of the shards")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f"{missing[0]} is not there")
    configs = [read_json(folder / "config.json") for folder in folders]
    shards = [Shard.parse(str(values.get("shard"))) for values in configs]
    common = same([{name: values.get(name) for name in OF_A_JOB} for values in configs], "settings")
    count, these = shards[0].count, ", ".join(map(str, shards))
    if sorted(shard.number for shard in shards) != list(range(1, count + 1)) or {s.count for s in shards} != {count}:
        raise UserError(f"the shards 1/{count} to {count}/{count} are wanted, each once; these are {these}")
    seed = common.pop("seed")
    return dict(zip(folders, shards)), from_json(JobConfig, common), seed


def same(values: list, what: str):
    """The value that all of `values` are. Raises `UserError`."""
    if any(value != values[0] for value in values):
        raise UserError(f"the shards have different {what}: they are not of one job")
    return values[0]


if __name__ == "__main__":
    run_recipe("merge_captions", main, {"default": Preset("", Config())})
