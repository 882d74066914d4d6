"""The folder of a run, and the checkpoints in it: `default_root_dir`, or the next runs/<Module>/version_N."""

import re
import shutil
from itertools import count
from pathlib import Path

from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.storage.runs import RUNS, make_first
from mlxmm.training.model_checkpoint import ModelCheckpoint


def open_run(trainer, ckpt_path: Path | str | None) -> list[Path | None]:
    """The checkpoint to resume from; and, where no `default_root_dir` is set, the folder of the run.

    A run that goes on from its "last" checkpoint keeps its folder. Every other one gets a new folder, if the trainer
    writes anything. To be called by one process.
    """
    found, config = find_checkpoint(trainer, ckpt_path), trainer.config
    if config.default_root_dir is not None:
        return [found, None]
    if ckpt_path == "last":
        return [found, _folder(trainer)]
    writes = config.enable_checkpointing or trainer.wants_default_loggers
    return [found, make_version(type(trainer.module).__name__) if writes else None]


def find_checkpoint(trainer, ckpt_path: Path | str | None) -> Path | None:
    """The checkpoint that `ckpt_path` names: "last" is the newest undamaged one of the run, "best" the one that
    `ModelCheckpoint` found best. Raises `UserError` where there is none."""
    if ckpt_path not in ("last", "best"):
        return None if ckpt_path is None else Path(ckpt_path)
    folder = (trainer.checkpoint_callback or ModelCheckpoint()).folder(_folder(trainer))
    if ckpt_path == "last":
        found = checkpoint.latest(folder) if folder else None
    else:
        found = (folder / "best").resolve() if folder and (folder / "best").exists() else None
    if found is None:
        told = ": 'best' needs ModelCheckpoint(monitor='val/loss')" if ckpt_path == "best" else ""
        raise UserError(f"ckpt_path={ckpt_path!r}: there is no such checkpoint in {folder or RUNS}{told}")
    return found


def remove_if_empty(folder: Path | None) -> None:
    """Remove the folder of a run that ended before it wrote anything."""
    if folder is not None and not any(path.is_file() for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)


def _folder(trainer) -> Path | None:
    """The folder of the run; where it has none yet, that of the newest run of this module with checkpoints."""
    versions = [path.parent for path in (RUNS / type(trainer.module).__name__).glob("version_*/checkpoints")]
    return trainer.log_dir or max(versions, key=_version, default=None)


def make_version(name: str) -> Path:
    """Make the folder of the next run of the module called `name`. No two processes get the same one."""
    newest = max(map(_version, (RUNS / name).glob("version_*")), default=-1)
    return make_first(RUNS / name / f"version_{version}" for version in count(newest + 1))


def _version(folder: Path) -> int:
    match = re.fullmatch(r"version_(\d+)", folder.name)
    return int(match[1]) if match else -1
