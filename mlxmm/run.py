"""A run's folder: made once, never written over, and found again to be resumed.

runs/<recipe>/<name>/config.json  metrics.jsonl  events.out.tfevents.*  checkpoints/  summary.json
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
from attrs.validators import ge, lt

from mlxmm import checkpoint, distributed
from mlxmm.config import UserError, from_json, option, take_flag, to_json
from mlxmm.files import remove_leftovers, whole_folder, write_json

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

    def part(self, name: str) -> "Run":
        """A run inside this one, which goes on from its own newest checkpoint if it has any."""
        return Run(*distributed.shared_paths(lambda: _open_part(self.folder / name)))

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return distributed.rank() == 0

    def print(self, text: str) -> None:
        """Print on one process only."""
        if self.is_global_zero:
            print(text)

    def write_summary(self, figures: dict) -> None:
        """Write `summary.json`, what a script or a paper's table would read: once every process has ended well."""
        distributed.barrier()
        if self.is_global_zero:
            write_json(self.folder / "summary.json", figures)


def open_run(config: RunConfig, recipe: str) -> Run:
    """Make the folder of a new run, or find that of one to be resumed. Writes `config.json`.

    Raises `UserError` where a new run's folder exists, or a run to be resumed does not.
    """
    return Run(*distributed.shared_paths(lambda: _open(config, recipe)))


def check_free(config: RunConfig) -> None:
    """Raise `UserError` where the folder of a new run exists: before data are opened, which may take a while."""

    def check() -> None:
        if config.resume is None and config.run_dir is not None and config.run_dir.exists():
            raise UserError(f"{config.run_dir} exists: name another --run-dir, or add --resume last")

    distributed.from_rank_zero(check)  # which makes the folder, while others may still be on their way here


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
    folder, ckpt_path = _find(config.resume, config.run_dir, recipe)
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


def read_saved_config(cls: type, recipe: str) -> Callable[[Sequence[str]], RunConfig | None]:
    """What reads, for the flags of a run to be resumed, the config that it was started with."""

    def read(argv):
        resume, rest = take_flag("--resume", argv)
        run_dir, _ = take_flag("--run-dir", rest)
        if resume is None:
            return None
        folder, ckpt_path = _find(resume, run_dir and Path(run_dir), recipe)
        path = (ckpt_path.resolve().parent.parent if ckpt_path else folder) / "config.json"
        return from_json(cls, json.loads(path.read_text())) if path.exists() else None

    return read


def _find(resume: str, run_dir: Path | None, recipe: str) -> tuple[Path, Path | None]:
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


def cached(name: str, key, make: Callable[[Path], None]) -> Path:
    """The folder of what `make(folder)` wrote for `key` (JSON values), now or in an earlier run.

    In $MLXMM_CACHE, or ~/.cache/mlxmm; whole or absent. All processes take part in the making, and rank 0 keeps it.
    """
    root = Path(os.environ.get("MLXMM_CACHE", Path.home() / ".cache" / "mlxmm"))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / f"{name}-{digest}"
    if not distributed.from_rank_zero(folder.exists):
        with whole_folder(folder) if distributed.rank() == 0 else tempfile.TemporaryDirectory() as temporary:
            make(Path(temporary))
    return distributed.shared_paths(lambda: [folder])[0]
