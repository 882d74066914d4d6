"""The Makefile picks MLX's backend for the machine. Here the machine is played by programs at the front of PATH."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def program(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def make(tmp_path):
    """make in a folder with the Makefile alone, on a Linux machine without a GPU."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.cfg", "pyproject.toml"):
        (tmp_path / name).touch()
    program(tmp_path, "uname", "echo Linux")
    program(tmp_path, "nvidia-smi", "exit 9")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        for name in ("BACKEND", "PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # `make test` exports the last ones
            environment.pop(name, None)
        command = ["make", f"PYTHON={sys.executable}", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    return run


def gpu(cuda: str) -> str:
    """A script that prints the heading of nvidia-smi."""
    line = f"| NVIDIA-SMI 580.65.06     Driver Version: 580.65.06     CUDA Version: {cuda:<6}  |"
    return f"echo '+-----------+'; echo '{line}'"


@pytest.mark.parametrize(
    ("system", "nvidia_smi", "arguments", "extras"),
    [
        ("Darwin", "exit 9", (), "dev"),
        ("Linux", "exit 9", (), "dev,cpu"),
        ("Linux", "echo 'NVIDIA-SMI has failed'", (), "dev,cpu"),
        ("Linux", gpu("11.8"), (), "dev,cpu"),
        ("Linux", gpu("12.4"), (), "dev,cuda12"),
        ("Linux", gpu("13.0"), (), "dev,cuda13"),
        ("Linux", gpu("14.1"), (), "dev,cuda13"),
        ("Linux", gpu("12.4"), ("BACKEND=cpu",), "dev,cpu"),
        ("Linux", "exit 9", ("BACKEND=cuda13",), "dev,cuda13"),
        ("Linux", "exit 9", ("BACKEND=",), "dev"),
    ],
)
def test_the_backend_is_that_of_the_machine_unless_it_is_named(system, nvidia_smi, arguments, extras, make, tmp_path):
    program(tmp_path, "uname", f"echo {system}")
    program(tmp_path, "nvidia-smi", nvidia_smi)
    done = make("-n", "test", *arguments)
    assert done.returncode == 0 and f'install --quiet -e ".[{extras}]"' in done.stdout, done.stdout + done.stderr


def test_another_backend_is_installed_into_a_new_venv(make, tmp_path):
    program(tmp_path, "python", 'mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "$@" >> log')
    for backend in ("cpu", "cpu", "cuda12"):
        assert make("demo", "PYTHON=python", f"BACKEND={backend}").returncode == 0
    steps = [line for line in (tmp_path / "log").read_text().splitlines() if "venv" in line or "pip" in line]
    venv = "-m venv --clear .venv"
    assert steps == [venv, "-m pip install --quiet -e .[dev,cpu]", venv, "-m pip install --quiet -e .[dev,cuda12]"]
