"""Resolve what mlxmm needs, on PyPI, for machines other than this one, without installing it.

    make resolve

For each machine and each Python it prints the versions that would be installed, with every extra that is no backend.
It exits with 1 if there is no solution of wheels alone, or if one does not have exactly one backend of MLX. uv
resolves, because pip reads environment markers (`platform_system == "Darwin"`) as those of the machine it runs on.
"""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import attrs

from mlxmm.backends import EXTRAS

SETUP = Path(__file__).parents[1] / "setup.cfg"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
BACKENDS = {"mlx-metal", *EXTRAS}
REPORTED = ("mlx", *sorted(BACKENDS), "mlx-lm", "transformers", "datasets", "huggingface-hub", "grain", "numpy")


@attrs.frozen
class Machine:
    """A kind of machine: its name, uv's name for it, and the extra of mlxmm with its backend."""

    name: str
    platform: str
    backend: str | None = None


# MLX's wheels are for macOS 14 and glibc 2.35 at the oldest.
MACHINES = [
    Machine("macOS 14 arm64", "aarch64-apple-darwin"),
    *(Machine(f"Linux x86_64 [{extra}]", "x86_64-manylinux_2_35", extra) for extra in EXTRAS.values()),
]


def main() -> None:
    wrong = 0
    for machine in MACHINES:
        for python in PYTHONS:
            versions, failure = resolve(machine, python)
            failure = failure or problem(versions)
            wrong += failure is not None
            report = f"WRONG: {failure}" if failure else described(versions)
            print(f"{machine.name}, Python {python}: {report}", flush=True)
    raise SystemExit(1 if wrong else 0)


def requirements(backend: str | None) -> str:
    """What setup.cfg names: what everybody needs, the extra `backend`, and all extras that are no backends."""
    setup = configparser.ConfigParser()
    setup.read(SETUP)
    extras = setup["options.extras_require"]
    chosen = [name for name in extras if name not in EXTRAS.values() or name == backend]
    return "\n".join([setup["options"]["install_requires"], *(extras[name] for name in chosen)])


def resolve(machine: Machine, python: str) -> tuple[dict[str, str], str | None]:
    """The versions of all packages by name; or none, and what uv says."""
    options = ["--python-platform", machine.platform, "--python-version", python, "--only-binary", ":all:"]
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", *options, "--no-header", "--no-annotate", "--quiet"]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    wanted = requirements(machine.backend)
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {}, " ".join(done.stderr.split())
    return dict(line.split("==") for line in done.stdout.splitlines() if "==" in line), None


def problem(versions: dict[str, str]) -> str | None:
    """What is wrong with a resolution: other than one backend of MLX, or one of another version; None if nothing is."""
    found = sorted(BACKENDS & set(versions))
    if len(found) != 1:
        return f"{len(found)} backends: {', '.join(found)}"
    if versions[found[0]] != versions["mlx"]:
        return f"mlx {versions['mlx']}, but {found[0]} {versions[found[0]]}"
    return None


def described(versions: dict[str, str]) -> str:
    shown = ", ".join(f"{name} {versions[name]}" for name in REPORTED if name in versions)
    return f"{shown}; {len(versions)} packages"


if __name__ == "__main__":
    main()
