"""The folder of a run, and the checkpoints in it: `default_root_dir`, or the next runs/<Module>/version_N."""

import re
import shutil
from itertools import count
from pathlib import Path

from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.storage.atomic import follow_link, remove_leftovers
from mlxmm.storage.checkpoint_folder import holds_checkpoints, named
from mlxmm.storage.lock import locked
from mlxmm.storage.runs import RUNS, make_first
from mlxmm.terminal import say
from mlxmm.training.model_checkpoint import ModelCheckpoint


def open_run(trainer, ckpt_path: Path | str | None) -> list[Path | None]:
    """The checkpoint to resume from; and, where no `default_root_dir` is set, the folder of the run.

    A run that goes on from its "last" checkpoint keeps its folder. Every other one gets a new folder, if the trainer
    writes anything. To be called by one process, which locks what the run writes until `close`.

    Raises `UserError`, before anything of the trainer is changed, where a new run would be mixed with another one.
    """
    config = trainer.config
    folder = _folder(trainer) if ckpt_path == "last" and config.default_root_dir is None else None
    try:
        _lock(trainer, config.default_root_dir or folder)  # before its checkpoints are read: a run may delete them
        for checkpoints in _checkpoint_folders(trainer, config.default_root_dir or folder):
            remove_leftovers(checkpoints)
        found = find_checkpoint(trainer, ckpt_path)
        if found is None:
            _check_free(trainer)
        elif folder is not None:
            say(f"resuming from {found}")
        if folder is None and config.default_root_dir is None and _writes(trainer):
            folder = make_version(type(trainer.module).__name__)
        _lock(trainer, config.default_root_dir or folder, make=True)
    except BaseException:
        trainer.locks.close()
        raise
    return [found, folder]


def _writes(trainer) -> bool:
    return trainer.config.enable_checkpointing or trainer.wants_default_loggers


def _lock(trainer, root: Path | None, *, make: bool = False) -> None:
    """Lock the folders that are there, or with `make` all that the run writes."""
    for folder in sorted({root if _writes(trainer) else None, *_checkpoint_folders(trainer, root)} - {None}):
        if make or folder.is_dir():
            trainer.locks.enter_context(locked(folder))


def close(trainer) -> None:
    """Unlock the folder of a run; remove it if `fit` made it and wrote nothing."""
    trainer.locks.close()
    if trainer.config.default_root_dir is None:
        remove_if_empty(trainer.log_dir)


def begin(trainer, state: dict | None) -> None:
    """Leave in the folder what this run has done: of one that goes on from a checkpoint, whose `state` is given, later
    checkpoints are set aside and logs cut; of a new one the logs of a run before it are set aside.

    Raises `UserError` where checkpoints are of another run, before anything is changed.
    """
    if state is None:
        for logger in trainer.loggers:
            logger.begin()
        return
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    for callback in savers:
        callback.check_run(trainer)
    for callback in savers:
        callback.go_back(trainer)
    _tell_of_branch(trainer, [saver for saver in savers if saver.dirpath])
    positions = list(state["loggers"])
    for logger in trainer.loggers:
        of_kind = [one for one in positions if one[0] == type(logger).__qualname__]
        logger.rewind(of_kind[0][1] if of_kind else None, trainer.global_step)
        positions = [one for one in positions if one not in of_kind[:1]]


def _tell_of_branch(trainer, savers: list[ModelCheckpoint]) -> None:
    """Say so where a run goes on from a checkpoint of another folder, which it leaves as it is."""
    folders = [saver.dirpath for saver in savers]
    if not folders or not trainer.is_global_zero or trainer.ckpt_path.resolve().parent in map(Path.resolve, folders):
        return
    chosen = ": best is chosen anew, of the checkpoints that are saved there" if any(s.monitor for s in savers) else ""
    say(f"the run goes on from {trainer.ckpt_path} in {folders[0]}{chosen}")


def _checkpoint_folders(trainer, root: Path | None) -> list[Path]:
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    folders = (
        [folder for saver in savers if (folder := saver.folder(root))] if trainer.config.enable_checkpointing else []
    )
    if len(set(folders)) < len(folders):
        raise UserError("two ModelCheckpoints keep their checkpoints in one folder: give one another dirpath")
    return folders


def _check_free(trainer) -> None:
    """Raise `UserError` where a run that begins at step 0 would be mixed with what an earlier one has left."""
    for folder in _checkpoint_folders(trainer, trainer.config.default_root_dir):
        if holds_checkpoints(folder):
            advice = "resume it, or name another folder (without default_root_dir each fit gets one)"
            raise UserError(f"{folder} holds checkpoints of another run: {advice}")


def find_checkpoint(trainer, ckpt_path: Path | str | None) -> Path | None:
    """The checkpoint that `ckpt_path` names: "last" is the newest undamaged one of the run, "best" the one that
    `ModelCheckpoint` found best. Raises `UserError` where there is none."""
    if ckpt_path not in ("last", "best"):
        return None if ckpt_path is None else follow_link(Path(ckpt_path))
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)] or [
        ModelCheckpoint()
    ]
    folders = [folder for saver in savers if (folder := saver.folder(_folder(trainer)))]
    folder = next(iter(folders), None)
    if ckpt_path == "last":
        found = checkpoint.latest(*folders)
    else:
        found = next(filter(None, (named(folder, "best") for folder in folders)), None)
    if found is None:
        told = ": 'best' needs ModelCheckpoint(monitor='val/loss')" if ckpt_path == "best" else _earlier(trainer)
        raise UserError(f"ckpt_path={ckpt_path!r}: there is no such checkpoint in {folder or RUNS}{told}")
    return found


def remove_if_empty(folder: Path | None) -> None:
    """Remove the folder of a run that ended before it wrote anything."""
    if folder is not None and not any(path.is_file() for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)


def _folder(trainer) -> Path | None:
    """The folder of the run; where it has none yet, that of the newest run of this module with checkpoints."""
    return trainer.log_dir or max(_versions(trainer), key=_version, default=None)


def _versions(trainer) -> list[Path]:
    return [path.parent for path in (RUNS / type(trainer.module).__name__).glob("version_*/checkpoints")]


def _earlier(trainer) -> str:
    """Where the newest run of this module that has one keeps its last checkpoint."""
    folders = [folder / "checkpoints" for folder in sorted(_versions(trainer), key=_version, reverse=True)]
    found = next((folder for folder in folders if named(folder, "last")), None)
    return f"; an earlier run has {found / 'last'}" if found and trainer.config.default_root_dir is None else ""


def make_version(name: str) -> Path:
    """Make the folder of the next run of the module called `name`. No two processes get the same one."""
    newest = max(map(_version, (RUNS / name).glob("version_*")), default=-1)
    return make_first(RUNS / name / f"version_{version}" for version in count(newest + 1))


def _version(folder: Path) -> int:
    match = re.fullmatch(r"version_(\d+)", folder.name)
    return int(match[1]) if match else -1
