"""A run's folder: made once, never overwritten, and found again to be resumed.

runs/<recipe>/<name>/config.json  data.json  metrics.jsonl  events.out.tfevents.*  checkpoints/  summary.json
"""

import contextlib
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path

import attrs
from attrs.validators import ge, lt

from mlxmm.commands import command, tool
from mlxmm.config import checked, option, to_json
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import Ended
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.storage.atomic import TEMPORARY, follow_link, remove_leftovers, write_json
from mlxmm.storage.checkpoint_folder import named
from mlxmm.storage.lineage import DATA, Lineage, require_unchanged
from mlxmm.storage.lock import locked
from mlxmm.terminal import say

RUNS = Path("runs")
LOGS = ("metrics.jsonl", "events.out.tfevents.*")
MODELS = ("checkpoints/best", "checkpoints/last", "model")  # the first that is there is a run's model
RESULTS = ("samples.png", "captions.jsonl", "model", "dataset", "summary.json")  # what the closing lines point to


@attrs.frozen(kw_only=True, field_transformer=checked)
class RunConfig:
    """What every recipe that keeps a folder has."""

    run_dir: Path | None = option(None, "folder of the run; none: runs/<recipe>/<date and time>", first=True)
    seed: int = option(0, "seed of weights, data and everything else that is random", ge(0), lt(2**24), first=True)


@attrs.frozen(kw_only=True, field_transformer=checked)
class TrainingRunConfig(RunConfig):
    """What every recipe that trains has: its run can be resumed."""

    resume: str | None = option(None, "`last`, or the folder of a checkpoint, to resume from", first=True)


@attrs.define
class Run:
    """An open run: its folder, the checkpoint to resume from, if any, and the metrics it has reported."""

    folder: Path
    ckpt_path: Path | None = None
    keeps_files: bool = True  # not with `fast_dev_run`, whose folder is deleted at the end
    metrics: dict = attrs.field(factory=dict, init=False)
    next_steps: dict[str, str] = attrs.field(factory=dict, init=False)  # commands, by what they do

    def subrun(self, name: str) -> "Run":
        """A run in a folder of this one, resumed from its newest checkpoint if it has one."""
        return Run(*collectives.broadcast_paths(lambda: _open_subrun(self.folder / name)), keeps_files=self.keeps_files)

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return collectives.rank() == 0

    def print(self, text: str) -> None:
        """Print on one process only."""
        if self.is_global_zero:
            say(*text.split("\n"))

    def suggest(self, what: str, recipe: str, *arguments: str | Path) -> None:
        """Name a command that one may want after this run: it is printed at the end."""
        self.next_steps[what] = command(recipe, *arguments)

    @property
    def model(self) -> Path | None:
        """The folder of the model that this run has trained: its best or last checkpoint, or its export."""
        return next((path for part in MODELS if (path := follow_link(self.folder / part)).is_dir()), None)

    def report(self, metrics: dict) -> None:
        """Add to the metrics of the run's end: numbers are printed then, all JSON values come into summary.json."""
        self.metrics |= metrics

    def save_lineage(self, sources: Sequence[dict]) -> None:
        """Write what the run is trained on as `data.json`; of a resumed run it stays. Raises `UserError` if a run is
        resumed on other data than its checkpoint's, before a tokenizer or a tower is made of them."""
        if self.ckpt_path is not None and sources:
            require_unchanged(Lineage.read(self.ckpt_path).sources or sources, sources)
        if self.is_global_zero and (self.ckpt_path is None or not _has_lineage(self.folder)):
            Lineage(tuple(sources)).write(self.folder)

    def save(self) -> None:
        """Write what was reported so far as `summary.json`: before something that takes long or may fail."""
        if self.is_global_zero:
            write_json(self.folder / "summary.json", self.metrics)


def _has_lineage(folder: Path) -> bool:
    with contextlib.suppress(UserError):
        return bool(Lineage.read(folder).sources)
    return False


@contextlib.contextmanager
def open_run(config: RunConfig, recipe: str) -> Iterator[Run]:
    """The run of a recipe, from its folder to its summary.

    At the beginning: makes the folder of a new run and writes its `config.json`, or finds the run to be resumed. At
    the end, once every process got there: writes `summary.json` with what was reported and the "seconds" it took
    (which an unfinished run does not have), prints the metrics, where the results are and what one may do next. A new
    run that fails before it wrote anything leaves no folder; with `fast_dev_run` none does. An exception that ends the
    run by a signal gets a note of what was kept, and of the command that goes on.

    Raises `UserError` where a new run's folder exists, where a run to be resumed does not or its checkpoint is damaged,
    and where the processes cannot train by the config's strategy.
    """
    start = time.perf_counter()
    if (trainer := getattr(config, "trainer", None)) is not None:
        collectives.check_strategy(trainer.strategy)
    if trainer is not None and trainer.fast_dev_run:
        with _tried(start) as run:
            yield run
        return
    lock = contextlib.ExitStack()
    run = Run(*collectives.broadcast_paths(lambda: _open(config, recipe, lock)))
    run.print(f"run: {run.folder}")
    try:
        with lock:
            yield run
            collectives.barrier()
            run.report({"seconds": time.perf_counter() - start})
            if run.is_global_zero:
                _close(run)
    except BaseException as error:
        if run.is_global_zero and run.ckpt_path is None:
            _remove_if_unused(run.folder)
        if isinstance(error, KeyboardInterrupt | Ended):
            error.add_note(_kept(run, recipe, resumable=hasattr(config, "resume")))
        raise


@contextlib.contextmanager
def _tried(start: float) -> Iterator[Run]:
    """A run that leaves no files: all are in a temporary folder until its end."""
    made = tempfile.mkdtemp(prefix="mlxmm-") if collectives.rank() == 0 else None
    [folder] = collectives.broadcast_paths(lambda: [Path(str(made))])
    try:
        run = Run(folder, keeps_files=False)
        yield run
        collectives.barrier()
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    run.report({"seconds": time.perf_counter() - start})
    run.print(f"{table(run.metrics)}\nfast_dev_run: everything ran, and no files were written")


def _kept(run: Run, recipe: str, *, resumable: bool) -> str:
    """What a run that was interrupted has kept, and the command that goes on from there."""
    if not run.folder.exists():
        return "nothing was kept"
    saved = sorted(run.folder.glob("**/checkpoints/last"), key=lambda link: link.lstat().st_mtime)
    kept = f"kept {named(saved[-1].parent, 'last') if saved else run.folder}"
    go_on = command(recipe, "--run-dir", run.folder, "--resume", "last")
    return f"{kept}; go on with: {go_on}" if resumable else kept


def model_of(path_or_id: str | Path) -> str:
    """Where the model of a run is, if `path_or_id` is the folder of one; else `path_or_id`."""
    inside = [path for part in MODELS if (path := Path(path_or_id) / part).exists()]
    return str(inside[0] if inside else path_or_id)


def find_run(recipe: str, resume: str, run_dir: Path | None) -> Path:
    """The folder of the run that `resume` names. Only looks: nothing is read from it, and nothing changed.

    Raises `UserError` where there is none.
    """
    if resume != "last":
        path = follow_link(Path(resume))
        if not (path / checkpoint.STATE).exists():
            raise UserError(f"--resume {resume}: no checkpoint is there; `last` takes the run's newest")
        return path.resolve().parent.parent
    runs = sorted((RUNS / recipe).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    folder = run_dir or (runs[-1].parent if runs else None)
    if folder is None or not folder.is_dir():
        raise UserError(f"--resume last: there is no run in {run_dir or RUNS / recipe}")
    return folder


def _open(config: RunConfig, recipe: str, lock: contextlib.ExitStack) -> tuple[Path, Path | None]:
    resume = getattr(config, "resume", None)
    if resume is None:
        folder = _make(config.run_dir, recipe)
        lock.enter_context(locked(folder))
        remove_leftovers(folder)
        try:
            _write_config(config, folder)
        except OSError:  # the disk is full
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder, None
    folder = find_run(recipe, resume, config.run_dir) if resume == "last" else None
    folder = folder or config.run_dir or find_run(recipe, resume, None)
    if resume != "last":
        checkpoint.read_state(Path(resume))
    lock.enter_context(locked(folder))
    remove_leftovers(folder / "checkpoints")
    ckpt_path = checkpoint.latest(folder / "checkpoints") if resume == "last" else follow_link(Path(resume))
    remove_leftovers(folder)
    if not (folder / "config.json").exists():
        _write_config(config, folder)
    return _reopen(folder, ckpt_path)


def _make(run_dir: Path | None, recipe: str) -> Path:
    if run_dir is not None and _is_empty(run_dir):
        return run_dir
    now = RUNS / recipe / time.strftime("%Y-%m-%d_%H-%M-%S")
    same_second = (now.with_name(f"{now.name}_{number}") for number in count(2))
    return make_first([run_dir] if run_dir else chain([now], same_second))


def _is_empty(folder: Path) -> bool:
    """Whether a folder is there and holds nothing, but for what a process left that was killed at its beginning."""
    return folder.is_dir() and all(path.name.startswith(TEMPORARY) for path in folder.iterdir())


def make_first(folders: Iterable[Path]) -> Path:
    """Make the first of `folders` that is not there yet: no two processes get the same one. Raises `UserError`."""
    for folder in folders:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    raise UserError(f"{folder} exists: name another --run-dir, or add --resume last")


def _write_config(config: RunConfig, folder: Path) -> None:
    changes = {"run_dir": folder} | ({"resume": None} if hasattr(config, "resume") else {})
    write_json(folder / "config.json", to_json(attrs.evolve(config, **changes)))


def _open_subrun(folder: Path) -> tuple[Path, Path | None]:
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder / "checkpoints")
    return _reopen(folder, checkpoint.latest(folder / "checkpoints"))


def _reopen(folder: Path, ckpt_path: Path | None) -> tuple[Path, Path | None]:
    """Without a checkpoint training starts again, so old logs are removed to avoid duplicate entries."""
    if ckpt_path is None:
        for path in (path for pattern in LOGS for path in folder.glob(pattern)):
            path.unlink()
    return folder, ckpt_path


def _remove_if_unused(folder: Path) -> None:
    """Remove the folder of a run that failed before it wrote anything but its settings and what its data are."""
    if {path.name for path in folder.iterdir()} <= {"config.json", DATA}:
        shutil.rmtree(folder)


def _close(run: Run) -> None:
    run.save()
    lines = [table(run.metrics)]
    lines += [f"{name.partition('.')[0]}: {run.folder / name}" for name in RESULTS if (run.folder / name).exists()]
    if any(run.folder.glob(LOGS[1])):
        run.next_steps["see the curves"] = _tensorboard(run.folder)
    if run.next_steps:
        lines += ["next:", *(f"  {what:<16}{command}" for what, command in run.next_steps.items())]
    say(*"\n".join(filter(None, lines)).split("\n"))


def _tensorboard(folder: Path) -> str:
    program, told = tool("tensorboard"), ""
    if program is None:
        program, told = "tensorboard", "  # once there is one: pip install tensorboard"
    return shlex.join([program, "--logdir", str(folder)]) + told


def table(metrics: dict) -> str:
    """A line for each number, chance beside it where "<name>_chance" is known."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    has_chance = any(name.endswith("_chance") for name in numbers)
    lines = [f"{'':<36}{'':>10}{'chance':>10}"] if has_chance else []
    for name, value in numbers.items():
        if not name.endswith("_chance"):
            chance = numbers.get(f"{name}_chance")
            shown = f"{value:>10}" if isinstance(value, int) else f"{value:>10.4f}"
            lines.append(f"{name:<36}{shown}" + (f"{chance:>10.4f}" if chance is not None else ""))
    return "\n".join(lines)
