"""The folder of a run's checkpoints: step=N, and the names `last` and `best`.

It holds one branch of the run: to go on from step N sets aside, as `abandoned_0` and so on, the checkpoints after N.
So the highest step is the newest checkpoint, whatever clocks say, and in copies that have lost the links too.
"""

import contextlib
import shutil
from itertools import count
from pathlib import Path

from mlxmm.errors import UserError
from mlxmm.storage.atomic import follow_link, move_aside, replace_link
from mlxmm.storage.checkpoint import STATE, by_step, copied_names, read_state, step_of
from mlxmm.terminal import say


def holds_checkpoints(folder: Path) -> bool:
    """Whether a run has saved checkpoints in `folder`."""
    return bool(by_step(folder)) or any(step_of(path) >= 0 for path in copied_names(folder))


def name_checkpoint(folder: Path, name: str, step: int | None) -> None:
    """Make `last` or `best` name the checkpoint of `step`; None: no checkpoint."""
    path = folder / name
    if step is not None:
        replace_link(path, folder / f"step={step}")
    elif path.is_symlink() or path.is_file():
        path.unlink()


def named(folder: Path, name: str) -> Path | None:
    """The checkpoint that `last` or `best` names, if it is there."""
    path = follow_link(folder / name)
    return path.resolve() if path.is_dir() else None


def newest_state(folder: Path) -> dict:
    """The state of the newest whole checkpoint in `folder`; {} if there is none."""
    for path in reversed(by_step(folder).values()):
        with contextlib.suppress(UserError):
            return read_state(path)
    return {}


def go_back(folder: Path, step: int) -> None:
    """Make the checkpoint of `step` the newest one: later ones are set aside. A kill leaves a folder that is right."""
    for path in copied_names(folder):
        _restore_name(path)
    later = [path for number, path in by_step(folder).items() if number > step]
    if later:
        aside = _make_aside(folder)
        for path in later:  # the lowest first: until the last one is moved, the old branch is the one to be resumed
            path.rename(aside / path.name)
        say(f"the run goes on from step {step}: its later checkpoints are in {aside}")


def _restore_name(path: Path) -> None:
    """Make a step=N again of a folder that was a link before it was copied."""
    step = step_of(path)
    checkpoint = path.with_name(f"step={step}")
    if step >= 0 and not _is_whole(checkpoint):
        if checkpoint.exists():
            move_aside(checkpoint)
        path.rename(checkpoint)
    elif step >= 0 and (checkpoint / STATE).read_bytes() == (path / STATE).read_bytes():  # checksums are in it
        shutil.rmtree(path)
    else:
        move_aside(path)


def _is_whole(folder: Path) -> bool:
    try:
        read_state(folder)
    except UserError:
        return False
    return True


def _make_aside(folder: Path) -> Path:
    aside = next(path for number in count() if not (path := folder / f"abandoned_{number}").exists())
    aside.mkdir()
    return aside
