"""Damage each file of a finished run and of its cache, and do what a user would do next.

    python -m tools.damage                  every file in every way
    python -m tools.damage --only caption   one way of use alone

Prints a line for each trial and a table, and exits with 1 unless all end well: with one line that names the damaged
file and exit code 2, or with the results of an undamaged run.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import attrs

SECONDS = 120  # within which a trial has to end
GOOD = ("named", "repaired", "harmless")
TRAIN = ["align_qwen3", "--preset", "tiny", "--cached-features", "--max-test", "2"]
SHORT = "--max-steps 5 --trainer.val-check-interval 5".split()  # the cache is that of a longer run
DATA = "--data.shapes.num-train 64 --data.shapes.num-val 16 --data.shapes.num-test 8".split()
MODEL = "run/checkpoints/best"
# What a user does next: the recipe and its flags, in a folder that holds `run` and `cache`.
USES = {
    "resume": ["align_qwen3", "--run-dir", "run", "--resume", "last"],
    "caption": ["caption", "--module", MODEL, "picture.png"],
    "evaluate": ["evaluate_captions", "--module", MODEL, *DATA, "--run-dir", "results"],
    "serve": ["serve", "run"],
    "again": [*TRAIN, *SHORT, "--run-dir", "results"],
}
LOGGED = ("seconds", "throughput/", "memory/")  # of a summary, what no second run repeats


# ---- the ways of damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(content))
    content[place] ^= 1 << random.Random(path.name + "bit").randrange(8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def retype(path: Path) -> None:
    """JSON of another type in place of the file."""
    path.write_text('["another", {"type": 1}]\n')


def retype_value(path: Path) -> None:
    """One value of a JSON file becomes one of another type."""
    values = json.loads(path.read_text())
    places = list(_places(values))
    holder, key = random.Random(path.name).choice(places)
    holder[key] = {"another": "type"} if not isinstance(holder[key], dict) else 7
    path.write_text(json.dumps(values, indent=2))


def _places(values) -> Iterator[tuple]:
    """(container, key) of all values in a JSON value."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield values, key
        yield from _places(value)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "cut": cut,
    "emptied": empty,
    "retyped": retype,
    "value": retype_value,
    "missing": Path.unlink,
}


# ---- trials


@attrs.frozen
class Trial:
    """One file, damaged in one way, and then used."""

    use: str
    file: str
    damage: str


def trials(root: Path) -> Iterator[Trial]:
    """All trials of the folder `root`, which holds `run` and `cache`."""
    readers = cycle(["caption", "evaluate", "serve"])
    for path in sorted(path for path in root.rglob("*.*") if path.is_file() and not path.is_symlink()):
        file = str(path.relative_to(root))
        for damage in DAMAGES if path.suffix == ".json" else [one for one in DAMAGES if one != "value"]:
            for use in uses_of(file, readers):
                yield Trial(use, file, damage)


def uses_of(file: str, readers: Iterator[str]) -> list[str]:
    """The uses that read a file, or may; of those that read a checkpoint alike, the next of `readers`."""
    if file.startswith("cache/"):
        return ["again"]
    if file.startswith("run/checkpoints/"):
        return ["resume", next(readers)]
    if file == "run/config.json":
        return ["resume", "serve"]
    return ["resume"] if file.startswith("run/") else []


def make_run(root: Path) -> None:
    """A tiny finished run with its cache, and a picture."""
    from PIL import Image

    code, _, told = in_child(root, [*TRAIN, "--run-dir", "run"])
    assert code == 0, told
    Image.new("RGB", (32, 32), "red").save(root / "picture.png")


def attempt(root: Path, trial: Trial | None, use: str, control: dict | None) -> tuple[str, dict | str]:
    """What came of a trial, in a copy of `root`, and the last line that it told."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root, copy, symlinks=True)
        if trial is not None:
            DAMAGES[trial.damage](copy / trial.file)
            if "/tower/" in trial.file or "/language_model/" in trial.file:
                shutil.rmtree(copy / "cache")  # else nobody needs these
        code, out, err = in_child(copy, USES[use])
        found = results(copy, use, out) if code == 0 else {}
        if trial is None:
            assert code == 0, err
            return "", found
        is_restored = (copy / trial.file).exists() and same(copy / trial.file, root / trial.file)
        last = (err.strip().splitlines() or [""])[-1]
        return outcome(trial, code, last, out + err, found == control, is_restored), last


def outcome(trial: Trial, code: int, last: str, told: str, is_same: bool, is_restored: bool) -> str:
    """What came of a trial, in a word: one of GOOD, or a fault in capitals."""
    path = Path(trial.file)
    is_named = path.name in last or (path.parent.name in last and trial.damage == "missing")
    if code == 0 and is_same and (is_restored or not _holds_arrays(trial)):
        return "repaired" if is_restored else "harmless"
    if code == 0:
        return "named" if path.name in told else "SILENT"
    if code == 2 and last.startswith("error: "):
        return "named" if is_named else "UNNAMED"
    return "HANG" if code == -signal.SIGALRM else f"CRASH {-code}" if code < 0 else "TRACEBACK"


def _holds_arrays(trial: Trial) -> bool:
    """Whether the file holds numbers that are computed with: the same captions do not show that these are right."""
    return trial.file.endswith((".safetensors", ".bin")) and (trial.use == "resume" or "optimizer" not in trial.file)


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def results(root: Path, use: str, out: str) -> dict:
    """What a use has made, as far as a second time makes the same."""
    if use in ("caption", "serve"):
        return {"printed": out.splitlines()[-1]}
    folder = root / ("run" if use == "resume" else "results")
    summary = json.loads((folder / "summary.json").read_text())
    found = {name: value for name, value in summary.items() if not name.startswith(LOGGED)}
    files = [folder / f"checkpoints/last/{name}.safetensors" for name in ("weights", "frozen")]
    return found | {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}


# ---- a recipe in a process of its own, forked from this one, so that a crash is an outcome too


def in_child(folder: Path, arguments: list[str]) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a recipe that runs in `folder`; a signal is negative."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(run(folder, arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return code, out.read(), err.read()


def run(folder: Path, arguments: list[str]) -> int:
    """Run a recipe as `python -m` does, and return its exit code."""
    os.chdir(folder)
    os.environ["MLXMM_CACHE"] = str(folder / "cache")
    sys.argv = arguments
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    try:
        if arguments[0] == "serve":
            serve(*arguments[1:])
        else:
            runpy.run_module(f"recipes.{arguments[0]}", run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    return code


def serve(model: str) -> None:
    """Load what `recipes.serve` serves, and caption a picture with it, without the server."""
    from PIL import Image

    from mlxmm.cli import run_recipe
    from mlxmm.config import Preset
    from mlxmm.storage.hub import local_folder
    from mlxmm.storage.runs import model_of
    from recipes.serve import Config, examples, load

    def main(config):
        captioner, shown = load(local_folder(model_of(config.model))), examples(Path(config.model))
        print(captioner.caption([Image.open("picture.png")]), len(shown))

    run_recipe("serve", main, {"default": Preset("", Config())})


def preload() -> None:
    """Import now what every child would import. Nothing is computed: MLX's threads would not live on in a child."""
    import mlx_lm.utils  # noqa: F401
    import tensorboardX  # noqa: F401
    import transformers  # noqa: F401

    for use in USES.values():
        runpy.run_module(f"recipes.{use[0]}", run_name="preloaded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=USES, help="one use alone")
    parser.add_argument("--every", type=int, default=1, help="each so many of the trials alone")
    parser.add_argument("--trial", action="append", help="this trial alone, and others named so: USE,FILE,DAMAGE")
    parser.add_argument("--base", type=Path, help="keep the finished run here, or take the one that is here")
    arguments = parser.parse_args()
    preload()
    with contextlib.ExitStack() as stack:
        root = (arguments.base or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        if not (root / "picture.png").exists():
            root.mkdir(parents=True, exist_ok=True)
            make_run(root)
        counts = try_all(root, list(chosen(root, arguments)))
    print_table(counts)
    good = sum(count for (_, what), count in counts.items() if what in GOOD)
    print(f"{good} of {counts.total()} right")
    sys.exit(0 if good == counts.total() else 1)


def chosen(root: Path, arguments) -> Iterator[Trial]:
    """The trials that the command line asks for; a file of `--trial` may be a pattern."""
    if arguments.trial is None:
        yield from (trial for trial in list(trials(root))[:: arguments.every] if arguments.only in (None, trial.use))
    for use, pattern, damage in (trial.split(",") for trial in arguments.trial or ()):
        yield Trial(use, str(min(root.glob(pattern)).relative_to(root)), damage)


def try_all(root: Path, chosen: list[Trial]) -> Counter:
    """How often each use came to each outcome. Prints a line for each trial."""
    controls = {use: attempt(root, None, use, None)[1] for use in dict.fromkeys(trial.use for trial in chosen)}
    counts: Counter = Counter()
    for trial in chosen:
        what, line = attempt(root, trial, trial.use, controls[trial.use])
        counts[trial.use, what] += 1
        print(f"{what:<10} {trial.use:<9} {trial.damage:<8} {trial.file}: {line[:200]}", flush=True)
    return counts


def print_table(counts: Counter) -> None:
    kinds = sorted({what for _, what in counts}, key=lambda what: (what not in GOOD, what))
    print(f"{'':<10}" + "".join(f"{kind:>11}" for kind in kinds))
    for use in dict.fromkeys(use for use, _ in counts):
        print(f"{use:<10}" + "".join(f"{counts[use, kind] or '':>11}" for kind in kinds))


if __name__ == "__main__":
    main()
