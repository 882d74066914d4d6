"""Compile the header of MLX's CPU kernels once: g++ then takes a quarter of the time for each kernel, same to the bit.

MLX writes each kernel's source into a folder, and calls g++ on it. Most of that call is spent on one header that all
kernels include. g++ looks beside the source for a compiled form of a header, and takes it if it was made by the same
compiler with the same flags; otherwise it reads the header as before.
"""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

HEADER = "mlx/backend/cpu/compiled_preamble.h"  # as the kernels include it
FLAGS = ("-std=c++17", "-O3", "-Wall", "-fPIC")  # MLX's own: a form that was made with others is not taken


@functools.cache
def precompile() -> None:
    """Make the compiled form, once per machine and version of MLX. Without one, kernels take longer: no error."""
    include = Path(mx.__file__).parent / "include"
    header, compiled = include / HEADER, kernels_folder() / f"{HEADER}.gch"
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError):  # no g++, or a folder of another user
        if not compiled.exists() or compiled.stat().st_mtime < header.stat().st_mtime:
            _compile(header, include, compiled)


def kernels_folder() -> Path:
    """Where MLX keeps its kernels, their sources and libraries."""
    return Path(tempfile.gettempdir()) / "mlx" / mx.__version__ / "cpu"  # type: ignore[attr-defined]  # MLX has no stub of it


def _compile(header: Path, include: Path, compiled: Path) -> None:
    compiled.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:
        made = Path(folder) / compiled.name
        command = ["g++", *FLAGS, "-I", str(include), "-x", "c++-header", str(header), "-o", str(made)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            os.replace(made, compiled)  # whole or not at all: other processes compile kernels meanwhile
