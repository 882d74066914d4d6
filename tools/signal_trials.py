"""Send each signal that ends a program at a chosen moment of each recipe, and look at how it ends.

    python -m tools.signal_trials                        every moment with SIGINT, SIGTERM, SIGHUP and SIGUSR1
    python -m tools.signal_trials --only training serving --signals TERM
    python -m tools.signal_trials --twice                two of each in a row

Prints a line for each trial and exits with 1 unless all end well: with exit code 128 + the signal's number and one line
that says what was kept. Where training had begun, the command that the line names must end with 0.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SECONDS = 120  # within which a command has to end
DATA = "--data.shapes.num-train 96 --data.shapes.num-val 32 --data.shapes.num-test 16".split()
ALIGN = ["align_qwen3", "--preset", "tiny", "--max-steps", "8", "--trainer.val-check-interval", "2", *DATA]
ALIGN += ["--cached-features", "--unfreeze-step", "4", "--run-dir", "run"]
MODEL = "trained/checkpoints/best"  # in the folder that all trials share
# Python runs this before anything else. It sends the signals at the chosen call of a function, or when a module is
# imported: the first one at once, the second one 50 ms later.
SENDER = """
import functools, importlib.machinery, os, sys, threading

NAME, PATH, NUMBER, *SIGNALS = os.environ.pop("SEND_AT").split()
calls = 0


def send():
    kill, own = os.kill, os.getpid()
    for number, each in reversed([*enumerate(SIGNALS)]):
        if number:
            later(0.05 * number, lambda: kill(own, int(each)))
        else:
            kill(own, int(each))


def later(seconds, act):
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def sending(function):
    @functools.wraps(function)
    def call(*arguments, **options):
        global calls
        calls += 1
        if PATH == "Engine.run":  # while it waits for requests
            later(0.3, send)
        elif calls == int(NUMBER):
            send()
        return function(*arguments, **options)

    return call


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        if PATH == "-":
            return send()
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def changed(module):
            run(module)
            *owners, last = PATH.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, last, sending(getattr(owner, last)))

        spec.loader.exec_module = changed
        return spec


sys.meta_path.insert(0, Finder())
"""


@attrs.frozen
class Moment:
    """Where a recipe is when the signal comes: before this call of a function, or this import."""

    arguments: list[str]
    module: str
    function: str = "-"
    call: int = 1
    resumes: bool = False  # training has begun: the line names a command that goes on
    codes: dict[int, int] = {}  # where it is not 128 + the number
    says: str = ""  # on standard output, in place of the line "interrupted"


PICTURES = ["a.png", "b.png", "c.png"]
CAPTIONS = ["write_captions", "--captioner.model", "shapes", "--captioner.batch-size", "4", *DATA, "--run-dir", "run"]
CAPTION = ["caption", "--module", MODEL, *PICTURES, "--to", "run.csv"]
EVALUATE = ["evaluate_captions", "--module", MODEL, *DATA, "--run-dir", "run"]
SERVE = ["serve", "trained", "--port", "0"]
UPDATE = "mlxmm.training.trainer", "Trainer._update"
MOMENTS = {
    "import": Moment(ALIGN, "mlxmm.modules.qwen3_aligner"),
    "first import": Moment(ALIGN, "mlxmm.backends"),
    "parsing": Moment(ALIGN, "mlxmm.cli", "parse_config"),
    "help": Moment(["align_qwen3", "--help"], "mlxmm.commands", "program"),
    "opening data": Moment(ALIGN, "mlxmm.data.caption_source", "open_source"),
    "tower": Moment(ALIGN, *UPDATE, 2, resumes=True),
    "language model": Moment(ALIGN, *UPDATE, 6, resumes=True),
    "features": Moment(ALIGN, "mlxmm.data.feature_cache", "_write", 3, resumes=True),
    "training": Moment(ALIGN, *UPDATE, 12, resumes=True),
    "validation": Moment(ALIGN, "mlxmm.training.eval_loop", "Evaluator.measure", 4, resumes=True),
    "checkpoint": Moment(ALIGN, "mlxmm.storage.checkpoint", "save", 4, resumes=True),
    "naming": Moment(ALIGN, "mlxmm.storage.checkpoint_folder", "name_checkpoint", 5, resumes=True),
    "captioning": Moment(ALIGN, "mlxmm.modules.captioning_module", "CaptioningModule.caption", 3, resumes=True),
    "sheet": Moment(ALIGN, "mlxmm.evaluation.contact_sheet", "contact_sheet", resumes=True),
    "summary": Moment(ALIGN, "mlxmm.storage.runs", "_close", resumes=True),
    "evaluation": Moment(EVALUATE, "mlxmm.modules.captioning_module", "CaptioningModule.caption_tokens"),
    "serving": Moment(SERVE, "mlxmm.serving.engine", "Engine.run", codes={signal.SIGINT: 0}, says="stopped"),
    "write captions": Moment(CAPTIONS, "mlxmm.captioners.journal", "Journal.add", 3, resumes=True),
    "data set": Moment(CAPTIONS, "mlxmm.captioners.journal", "Journal.close", resumes=True),
    "caption": Moment(CAPTION, "mlxmm.modules.captioning_module", "CaptioningModule.stream_caption", 2),
    "look at data": Moment(["look_at_data", *DATA], "mlxmm.data.splits", "open_splits"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--signals", nargs="+", default=["INT", "TERM", "HUP", "USR1"], help="without SIG")
    parser.add_argument("--twice", action="store_true", help="send each signal a second time, at the next call")
    parser.add_argument("--jobs", type=int, default=1, help="commands that run at the same time")
    args = parser.parse_args()
    signals = [signal.Signals[f"SIG{name}"] for name in args.signals]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would ours
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under `nohup`
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        prepare(Path(folder))
        trials = [(name, number) for name in args.only for number in signals]
        faults = list(pool.map(lambda trial: told(Path(folder), *trial, args.twice), trials))
    print(f"{faults.count('')} of {len(faults)} right")
    sys.exit(any(faults))


def told(root: Path, name: str, number: signal.Signals, twice: bool) -> str:
    fault, line = attempt(root, MOMENTS[name], [number, number] if twice else [number])
    print(f"{fault or 'right':<10} {name:<15} {number.name:<8} {line[:300]}", flush=True)
    return fault


def prepare(root: Path) -> None:
    """What the trials share: a trained captioner and pictures."""
    from PIL import Image

    (root / "sender").mkdir()
    (root / "sender/sitecustomize.py").write_text(SENDER)
    for name in PICTURES:
        Image.new("RGB", (32, 32), "red").save(root / name)
    done = run(root, [*ALIGN[:-1], "trained"], root)
    assert done.returncode == 0, done.stderr


def attempt(root: Path, moment: Moment, numbers: list[int]) -> tuple[str, str]:
    """What is wrong with how a recipe ends that gets these signals at this moment, and the last line it told."""
    with tempfile.TemporaryDirectory(dir=root) as own:
        for name in ("trained", *PICTURES):
            (Path(own) / name).symlink_to(root / name)
        sent = {"SEND_AT": f"{moment.module} {moment.function} {moment.call} {' '.join(str(int(n)) for n in numbers)}"}
        try:
            done = run(Path(own), moment.arguments, Path(own), sent)
            fault = fault_of(done, moment, numbers)
            if not fault and moment.resumes:
                fault = resumed(Path(own), done)
        except subprocess.TimeoutExpired:
            return "HANGS", ""
    return fault, (done.stderr.strip().splitlines() or [""])[-1]


def fault_of(done: subprocess.CompletedProcess, moment: Moment, numbers: list[int]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith(("interrupted", "error: "))]
    code = moment.codes.get(numbers[0], 128 + numbers[0])
    if "Traceback" in done.stderr or "Exception ignored" in done.stderr:
        return "TRACEBACK"
    is_told_again = len(numbers) > 1 and done.stderr.endswith("interrupted again: ended at once\n")
    if done.returncode != (128 + numbers[0] if is_told_again else code):
        return f"CODE {done.returncode}"
    if moment.says and not is_told_again:
        return "" if not done.stderr and done.stdout.endswith(f"{moment.says}\n") else "LINES"
    if len(lines) != 1 or not done.stderr.endswith(f"{lines[0]}\n"):
        return "LINES"
    is_told = not moment.resumes or "; go on with: " in lines[0] or lines[0].startswith("interrupted again")
    return "" if is_told else "NO COMMAND"


def resumed(own: Path, done: subprocess.CompletedProcess) -> str:
    """Whether the command that the line names works; that training goes on from a checkpoint if there is one."""
    _, found, command = done.stderr.rpartition(" -m recipes.")
    if not found:  # two of SIGINT end it at once
        command = f"{ALIGN[0]} --run-dir run --resume last"
    again = run(own, shlex.split(command), own)
    return "" if again.returncode == 0 else f"RESUME {again.returncode}: {again.stderr[-300:]}"


def run(folder: Path, arguments: Iterable, own: Path, variables: dict[str, str] | None = None):
    """A recipe in `folder`, with a cache of its own: in a session of its own, as after a login."""
    paths = [str(ROOT)] if variables is None else [str(folder.parent / "sender"), str(ROOT)]
    environment = os.environ | {"MLXMM_CACHE": str(own / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    recipe, *flags = arguments
    command = [sys.executable, "-m", f"recipes.{recipe}", *map(str, flags)]
    settings = {"cwd": folder, "env": environment | (variables or {}), "capture_output": True, "text": True}
    return subprocess.run(command, start_new_session=True, timeout=SECONDS, stdin=subprocess.DEVNULL, **settings)


if __name__ == "__main__":
    main()
