"""MLX's backends on Linux are extras: what is missing, doubled or broken is one line that says what to install."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxmm.backends import conflict, installed_backends

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux is the backend a package apart")
NO_LIBRARY = "libmlx.so: cannot open shared object file: No such file or directory"  # as the dynamic linker says it
NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"


def describe(folder: Path, name: str, version: str) -> None:
    """Put the metadata of an installed package into `folder`."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def python(arguments: str, folder: Path, failure: str | None = None, **installed: str) -> subprocess.CompletedProcess:
    """Python where only the `installed` packages (name=version) are, and `import mlx.core` raises `failure`."""
    (folder / "mlx").mkdir()
    (folder / "mlx/core.py").write_text("" if failure is None else f"raise ImportError({failure!r})")
    for name, version in installed.items():
        describe(folder, name, version)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-S", *arguments.split(maxsplit=1)]  # -S: without site-packages
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_a_backend_is_an_extra_and_nothing_that_everybody_installs():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    assert [line for line in required if line.startswith(("mlx>", "mlx[", "scipy"))] == ["mlx>=0.32.4,<1"]
    extras = setup["options.extras_require"]
    assert extras["cpu"].splitlines()[1:] == [
        "mlx[cpu]>=0.32.4,<1",
        'scipy-openblas32>=0.3.30,<1; sys_platform == "linux"',
    ]
    assert extras["cuda12"].split() == ["mlx[cuda12]>=0.32.4,<1"]
    headers = 'nvidia-cuda-crt>=13,<14; sys_platform == "linux"'  # which MLX compiles quantized products with
    assert extras["cuda13"].splitlines()[1:] == ["mlx[cuda13]>=0.32.4,<1", headers]


@LINUX
@pytest.mark.parametrize("arguments", ["-c import mlxmm", "-m mlxmm", "-m recipes.caption"])
def test_without_a_backend_every_entry_says_on_one_line_what_to_install(arguments, tmp_path):
    done = python(arguments, tmp_path, NO_LIBRARY, mlx="0.32.4")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        'error: pip install "mlxmm[cpu]", or "mlxmm[cuda12]" or "mlxmm[cuda13]" with an NVIDIA GPU: '
        "MLX has no backend on this machine\n"
    )


@LINUX
@pytest.mark.parametrize(
    ("failure", "installed", "line"),
    [
        (
            NO_LIBRARY,
            {"mlx": "0.32.4", "mlx_cpu": "0.32.4"},
            f"pip install --force-reinstall --no-deps mlx-cpu==0.32.4: mlx-cpu cannot be loaded ({NO_LIBRARY})",
        ),
        (
            NO_DRIVER,
            {"mlx": "0.32.4", "mlx_cuda_12": "0.32.4"},
            'install NVIDIA\'s driver, or: pip uninstall -y mlx-cuda-12, then pip install "mlxmm[cpu]": '
            f"mlx-cuda-12 cannot be loaded ({NO_DRIVER})",
        ),
        (
            "libnccl.so.2: cannot open",
            {"mlx": "0.32.4", "mlx_cuda_13": "0.32.4"},
            'pip install "mlxmm[cuda13]": mlx-cuda-13 cannot be loaded (libnccl.so.2: cannot open)',
        ),
        (
            "undefined symbol: _ZN3mlx4core",
            {"mlx": "0.32.4", "mlx_cpu": "0.32.2"},
            'pip install "mlx[cpu]==0.32.4": mlx is 0.32.4, its backend mlx-cpu is 0.32.2',
        ),
    ],
)
def test_a_backend_that_cannot_be_loaded_is_one_line_that_says_what_to_do(failure, installed, line, tmp_path):
    assert python("-c import mlxmm", tmp_path, failure, **installed).stderr == f"error: {line}\n"


def test_two_backends_are_found_even_where_one_of_them_works(tmp_path, monkeypatch):
    for name in ("mlx", "mlx_cpu", "mlx_cuda_12"):
        describe(tmp_path, name, "0.32.4")
    monkeypatch.syspath_prepend(tmp_path)
    if "mlx-cuda-13" in installed_backends():  # this machine's own
        pytest.skip("there are three")
    assert conflict() == (
        'pip uninstall -y mlx-cpu mlx-cuda-12, then pip install "mlxmm[cpu]" or "mlxmm[cuda12]": '
        "each of these backends overwrites the other's libmlx.so"
    )


@pytest.mark.skipif(len(installed_backends()) != 1, reason="MLX has no backend package here")
def test_a_backend_of_another_version_is_found_even_where_it_works(tmp_path, monkeypatch):
    describe(tmp_path, "mlx", "99.1")
    monkeypatch.syspath_prepend(tmp_path)
    [(name, version)] = installed_backends().items()
    assert conflict() == f'pip install "mlx[{name.removeprefix("mlx-").replace("cuda-", "cuda")}]==99.1": ' + (
        f"mlx is 99.1, its backend {name} is {version}"
    )


def test_other_import_errors_are_reported_as_ever(tmp_path):
    done = python("-c import mlxmm", tmp_path, mlx="0.32.4", mlx_cpu="0.32.4")  # what is missing here is mlx.utils
    assert "Traceback" in done.stderr and "ModuleNotFoundError" in done.stderr
