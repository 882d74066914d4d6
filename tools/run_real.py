"""Run a preset of `recipes.align_qwen3` at its real size, from Hub ids to the exported model, and tell what it takes.

    python -m tools.run_real
    python -m tools.run_real --preset flickr30k-lora --batch-size 12
    python -m tools.run_real --tiny

The repositories that the preset names are made once, with random weights (tools/make_real_layouts.py), and served by a
Hub on this machine; a process downloads, trains, validates, captions and exports. Only the number of updates and of
held-out pictures differ from the preset: the last update comes after the unfreezing. Other flags go to the recipe.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlxmm.recipes.align_qwen3 import PRESETS
from mlxmm.storage.cache import cached
from tests.local_hub import LocalHub
from tools.make_real_layouts import NAMES, ROWS, make

ROOT = Path(__file__).parents[1]
GIB = 2**30
TINY = ["--module.projector-width", "32"]  # no wider than the narrow language model, or it could not be exported


def main() -> None:
    arguments, flags = parse()
    config = PRESETS[arguments.preset].config
    names = [str(name).partition("@")[0] for name in (config.module.vision, config.module.lm, config.data.only_source)]
    if unknown := [name for name in names if name not in NAMES]:
        sys.exit(
            f"--preset {arguments.preset} reads {', '.join(unknown)}: choose one that reads some of {', '.join(NAMES)}"
        )
    batch = config.data.batch_size * config.trainer.accumulate_grad_batches
    rows = max(ROWS, int(1.2 * batch * arguments.updates))
    settings = {"names": names, "tiny": arguments.tiny, "rows": rows}
    layouts = cached("real-layouts", settings, lambda folder: make(folder, names, tiny=arguments.tiny, rows=rows))
    with work_folder(arguments.keep) as work, LocalHub(layouts) as hub:
        code = run(hub, work, [*recipe_flags(arguments), *flags])
        if (work / "report.json").exists():
            report = json.loads((work / "report.json").read_text())
            report["settings"] = {"preset": arguments.preset} | report["settings"]
            print_report(report, sizes(work, layouts))
    sys.exit(code)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those for the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name, preset in PRESETS.items() if preset.config.module.lm]  # others train their parts
    parser.add_argument("--preset", choices=presets, default="flickr30k")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--val-batches", type=int, default=1, help="validation batches")
    parser.add_argument("--max-test", type=int, default=8, help="pictures of the test split to caption")
    parser.add_argument("--tiny", action="store_true", help="narrow networks of few layers: seconds, to try this tool")
    parser.add_argument("--keep", type=Path, help="a new folder for downloads, run and export; none: they are deleted")
    return parser.parse_known_args()


def recipe_flags(arguments) -> list[str]:
    flags = ["--preset", arguments.preset, "--max-steps", arguments.updates, "--unfreeze-step", arguments.updates - 1]
    flags += ["--trainer.limit-val-batches", arguments.val_batches, "--max-test", arguments.max_test]
    return [*map(str, flags), *(TINY if arguments.tiny else [])]


@contextlib.contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        keep.mkdir(parents=True)
        yield keep.resolve()


def run(hub: LocalHub, work: Path, flags: list[str]) -> int:
    """The exit code of the recipe, in a process that starts with an empty cache."""
    environment = hub.environment(work / "hub") | {"MLXMM_CACHE": str(work / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.run_real_child", work / "report.json", time.time()]
    command += ["--run-dir", work / "run", *flags]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment).returncode


# ---- what is printed


def sizes(work: Path, layouts: Path) -> dict[str, int]:
    """Bytes on the disk."""
    folders = {
        "repositories of the Hub": layouts,
        "downloads": work / "hub" / "hub",
        "data sets made of them": work / "hub" / "datasets",
        "checkpoints": work / "run" / "checkpoints",
        "exported model": work / "run" / "export",
        "run, with both": work / "run",
        "cache": work / "cache",
    }
    return {name: size(folder) for name, folder in folders.items()}


def size(folder: Path) -> int:
    """The bytes of all files; what several checkpoints share counts once."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())


def print_report(report: dict, disk: dict[str, int]) -> None:
    print("\n" + ", ".join(f"{name} {value}" for name, value in report["settings"].items()))
    print("losses " + ", ".join(f"{loss:.4f}" for loss in report["losses"]))
    print(f"\n{'phase':<36}{'seconds':>10}{'MLX GiB':>10}{'resident GiB':>14}")
    for name, phase in report["phases"].items():
        peaks = (phase["mlx_peak"] / GIB, phase["resident_peak"] / GIB)
        print(f"{name:<36}{phase['seconds']:>10.2f}{peaks[0]:>10.2f}{peaks[1]:>14.2f}")
    print(f"{'from start to end':<36}{report['seconds']:>10.2f}")
    print(f"\n{'part':<36}{'type':>10}{'arrays':>10}{'GiB':>14}")
    for part, types in report["types"].items():
        for name, (count, num_bytes) in types.items():
            print(f"{part:<36}{name:>10}{count:>10}{num_bytes / GIB:>14.3f}")
    print(f"\n{'on the disk':<36}{'GiB':>10}")
    for name, num_bytes in disk.items():
        print(f"{name:<36}{num_bytes / GIB:>10.3f}")


if __name__ == "__main__":
    main()
