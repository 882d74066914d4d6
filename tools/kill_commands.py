"""Kill commands at random moments of their whole course, start each again, and compare its end with one never killed.

    python -m tools.kill_commands                              50 kills of each command
    python -m tools.kill_commands --only align export --kills 10 --jobs 2

    align      align_qwen3: its tower, its language model, cached features, alignment, captions, sheet, summary
    ranks      train_captioner as two ranks of mlx.launch, both killed
    captions   write_captions: journal and data set
    push       write_captions --push-to, to a Hub on this machine
    export     an aligner saved for transformers

Prints a line for each kill, then how many ends of each command are the same to the bit; exits with 1 unless all are.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pyarrow.parquet as parquet

from tests.local_hub import LocalHub
from tools.chaos import compare

ROOT = Path(__file__).parents[1]
FEW = "--data.shapes.num-train 160 --data.shapes.num-val 32 --data.shapes.num-test 16".split()
TRAIN = [*"--preset tiny --batch-size 16 --checkpoint-every 5 --trainer.val-check-interval 10".split(), *FEW]
ALIGN = [*TRAIN, *"--max-steps 30 --unfreeze-step 15 --cached-features --module.projector-width 32".split()]
CAPTIONS = "--captioner.model shapes --captioner.batch-size 4 --data.shapes.num-train 300".split()
EXPORT = """
import sys
from mlxmm import Qwen3Aligner
Qwen3Aligner.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@attrs.frozen
class Trial:
    """A command, what it is given in a folder of its own, and what is compared of two such folders."""

    arguments: Callable[[Path], list]
    compares: Callable[[Path, Path, LocalHub], bool]
    resumes: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=1, help="commands that run at the same time")
    args = parser.parse_args()
    good = {name: ends_the_same(name, args) for name in args.only}
    print("\n".join(f"{name:<10}{count} of {args.kills} ends the same to the bit" for name, count in good.items()))
    sys.exit(any(count < args.kills for count in good.values()))


def ends_the_same(name: str, args: argparse.Namespace) -> int:
    """How many of the killed and repeated commands end as one that was never killed."""
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, LocalHub(made(Path(folder) / "hub")) as hub:
        prepare(name, Path(folder))
        for run in ("first", "whole"):  # the first one compiles kernels
            start = time.perf_counter()
            code = launch(name, made(Path(folder) / run), hub).wait()
            assert code == 0, (Path(folder) / run / "log").read_text()
        seconds = time.perf_counter() - start
        moments = [(number, rng.uniform(0, seconds)) for number in range(args.kills)]
        trial = lambda each: killed_once(name, Path(folder), hub, *each)
        with ThreadPoolExecutor(args.jobs) as pool:
            return sum(pool.map(trial, moments))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def killed_once(name: str, folder: Path, hub: LocalHub, number: int, after: float) -> bool:
    own = made(folder / str(number))
    process = launch(name, own, hub)
    try:
        process.wait(after)
        ended = "ended before"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = f"killed, {sum(1 for _ in own.rglob('.tmp-*'))} half written"
    is_whole = not TRIALS[name].resumes and (own / "run").exists()  # it would not be replaced
    code = 0 if is_whole else launch(name, own, hub).wait()
    same = code == 0 and TRIALS[name].compares(folder / "whole", own, hub)
    verdict = "the same" if same else f"DIFFERENT, exit code {code}: {(own / 'log').read_text()[-400:]}"
    print(f"{name} {number + 1}: after {after:.1f} s {ended}; {verdict}", flush=True)
    return same


def launch(name: str, own: Path, hub: LocalHub) -> subprocess.Popen:
    """Start a command, or what one would type after it was lost, as a group of processes that is killed at once."""
    command = TRIALS[name].arguments(own)
    if (own / "run/config.json").exists() and TRIALS[name].resumes:
        command += ["--resume", "last"]
    environment = hub.environment(own / "home") | {"MLXMM_CACHE": str(own / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "HF_TOKEN": "hf_any", "HF_HUB_DISABLE_XET": "1"}
    with (own / "log").open("a") as log:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def prepare(name: str, folder: Path) -> None:
    """What an export reads: an aligner that was trained."""
    if name == "export":
        with LocalHub(made(folder / "none")) as hub:
            assert launch("align", made(folder / "trained"), hub).wait() == 0


# ---- what is compared


def same_run(whole: Path, killed: Path, hub: LocalHub) -> bool:
    sheets = [(own / "run/samples.png").read_bytes() for own in (whole, killed)]
    return compare(whole / "run", killed / "run", True) and sheets[0] == sheets[1]


def same_files(whole: Path, killed: Path, hub: LocalHub) -> bool:
    return digests(whole / "run") == digests(killed / "run") and not list(killed.rglob(".tmp-*"))


def same_captions(whole: Path, killed: Path, hub: LocalHub) -> bool:
    return rows(whole / "run") == rows(killed / "run") and not list(killed.rglob(".tmp-*"))


def same_commit(whole: Path, killed: Path, hub: LocalHub) -> bool:
    """The newest commit of each to the Hub."""
    commits = [hub.root / ".commits" / hub.commits[f"someone/{own.name}"][-1] for own in (whole, killed)]
    return same_captions(whole, killed, hub) and rows(commits[0]) == rows(commits[1])


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path) -> list[dict]:
    """The captions of the tables in a folder, without the time at which each was written."""
    tables = sorted(folder.rglob("*.parquet"))
    assert tables, f"no table in {folder}"
    return [row for table in tables for row in parquet.read_table(table).drop("created_at").to_pylist()]


def recipe(name: str, *flags) -> Callable[[Path], list]:
    return lambda own: [sys.executable, "-m", f"recipes.{name}", *flags, "--run-dir", own / "run"]


def ranks(own: Path) -> list:
    launcher = Path(sys.executable).with_name("mlx.launch")
    flags = [*TRAIN, "--max-steps", "30", "--run-dir", own / "run"]
    return [launcher, "-n", "2", "--", sys.executable, "-m", "recipes.train_captioner", *flags]


def pushed(own: Path) -> list:
    return [*recipe("write_captions", *CAPTIONS)(own), "--push-to", f"someone/{own.name}"]


def exported(own: Path) -> list:
    return [sys.executable, "-c", EXPORT, own.parent / "trained/run/checkpoints/best", own / "run"]


TRIALS = {
    "align": Trial(recipe("align_qwen3", *ALIGN), same_run),
    "ranks": Trial(ranks, same_run),
    "captions": Trial(recipe("write_captions", *CAPTIONS), same_captions),
    "push": Trial(pushed, same_commit),
    "export": Trial(exported, same_files, resumes=False),
}


if __name__ == "__main__":
    main()
