"""A run's folder: made once, never written over, and found again to be resumed.

runs/<recipe>/<name>/config.json  metrics.jsonl  events.out.tfevents.*  checkpoints/  summary.json
"""

import time
from pathlib import Path

import attrs
from attrs.validators import ge, lt

from mlxmm.config import option, to_json
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.storage.atomic import remove_leftovers, write_json

RUNS = Path("runs")


@attrs.frozen(kw_only=True)
class RunConfig:
    """What every recipe has."""

    run_dir: Path | None = option(None, "folder of the run; none: runs/<recipe>/<date and time>")
    resume: str | None = option(None, "`last`, or a checkpoint's folder, to go on from")
    seed: int = option(0, "of weights, data and all else that is random", ge(0), lt(2**24))


@attrs.frozen
class Run:
    """An open run: its folder, and the checkpoint to go on from, if any."""

    folder: Path
    ckpt_path: Path | None = None

    def subrun(self, name: str) -> "Run":
        """A run inside this one, which goes on from its own newest checkpoint if it has any."""
        return Run(*collectives.broadcast_paths(lambda: _open_part(self.folder / name)))

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return collectives.rank() == 0

    def print(self, text: str) -> None:
        """Print on one process only."""
        if self.is_global_zero:
            print(text)

    def write_summary(self, figures: dict) -> None:
        """Write `summary.json`, what a script or a paper's table would read: once every process has ended well."""
        collectives.barrier()
        if self.is_global_zero:
            write_json(self.folder / "summary.json", figures)


def open_run(config: RunConfig, recipe: str) -> Run:
    """Make the folder of a new run, or find that of one to be resumed. Writes `config.json`.

    Raises `UserError` where a new run's folder exists, or a run to be resumed does not.
    """
    return Run(*collectives.broadcast_paths(lambda: _open(config, recipe)))


def check_free(config: RunConfig) -> None:
    """Raise `UserError` where the folder of a new run exists: before data are opened, which may take a while."""

    def check() -> None:
        if config.resume is None and config.run_dir is not None and config.run_dir.exists():
            raise UserError(f"{config.run_dir} exists: name another --run-dir, or add --resume last")

    collectives.broadcast_object(check)  # which makes the folder, while others may still be on their way here


def _open_part(folder: Path) -> tuple[Path, Path | None]:
    folder.mkdir(exist_ok=True)
    return _reopened(folder, checkpoint.latest(folder / "checkpoints"))


def _open(config: RunConfig, recipe: str) -> tuple[Path, Path | None]:
    if config.resume is None:
        folder = config.run_dir or RUNS / recipe / time.strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder} exists: name another --run-dir, or add --resume last") from None
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}") from None
        write_json(folder / "config.json", to_json(attrs.evolve(config, run_dir=folder)))
        return folder, None
    folder, ckpt_path = find_run(config.resume, config.run_dir, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", to_json(attrs.evolve(config, run_dir=folder, resume=None)))
    return _reopened(folder, ckpt_path)


def _reopened(folder: Path, ckpt_path: Path | None) -> tuple[Path, Path | None]:
    """A run to go on with; without a checkpoint it begins anew, and what it logged before would come twice."""
    if ckpt_path is None:
        for path in [*folder.glob("metrics.jsonl"), *folder.glob("events.out.tfevents.*")]:
            path.unlink()
    return folder, ckpt_path


def find_run(resume: str, run_dir: Path | None, recipe: str) -> tuple[Path, Path | None]:
    """The folder of the run that `resume` names, and its checkpoint (none, if it was stopped before any)."""
    if resume != "last":
        path = Path(resume)
        if not (path / checkpoint.STATE).exists():
            raise UserError(f"--resume {resume}: no checkpoint is there; `last` takes the run's newest")
        return run_dir or path.resolve().parent.parent, path
    runs = sorted((RUNS / recipe).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    folder = run_dir or (runs[-1].parent if runs else None)
    if folder is None or not folder.is_dir():
        raise UserError(f"--resume last: there is no run in {run_dir or RUNS / recipe}")
    return _reopened(folder, checkpoint.latest(folder / "checkpoints"))


def table(figures: dict[str, float]) -> str:
    """A line for each figure, chance beside it where it is known."""
    lines = [f"{'':<36}{'':>10}{'chance':>10}"]
    for name, value in figures.items():
        if not name.endswith("_chance"):
            chance = figures.get(f"{name}_chance")
            lines.append(f"{name:<36}{value:>10.4f}" + (f"{chance:>10.4f}" if chance is not None else ""))
    return "\n".join(lines)
