"""Kernels are compiled with a header that was compiled once, and come out the same to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu or sys.platform != "linux", reason="only on Linux CPUs does MLX call g++"
)
ROOT = Path(__file__).parents[2]
COMPILES = """
import mlx.core as mx
from mlxmm.compute import kernel_header
kernel_header.precompile()
print(mx.compile(lambda x: mx.abs(x * 2 + 1))(mx.array([1.0, -3.0])).tolist())
"""


def run(temporary: Path) -> tuple[Path, Path]:
    """Let a process compile a kernel with `temporary` for its files: the compiled header, and the kernel's source."""
    environment = os.environ | {"TMPDIR": str(temporary)}
    command = [sys.executable, "-c", COMPILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[3.0, 5.0]\n", done.stderr
    [header], [kernel] = temporary.rglob("*.gch"), temporary.rglob("*.cpp")
    return header, kernel


def library(kernel: Path) -> tuple[bytes, str]:
    """What g++ makes of a kernel as MLX calls it, and the first of the headers that it read, after "!" if compiled."""
    include = Path(mx.__file__).parent / "include"
    command = ["g++", "-std=c++17", "-O3", "-Wall", "-fPIC", "-shared", "-H", "-I", str(include), kernel.name]
    told = subprocess.run([*command, "-o", "out"], cwd=kernel.parent, capture_output=True, text=True, check=True).stderr
    return (kernel.parent / "out").read_bytes(), told.splitlines()[0]


def test_a_kernel_is_the_same_to_the_bit_with_a_header_that_was_compiled_once(tmp_path):
    header, kernel = run(tmp_path)
    with_it, first = library(kernel)
    assert first == f"! {header.relative_to(kernel.parent)}"
    header.unlink()
    without, first = library(kernel)
    assert first.startswith(". ") and with_it == without


@pytest.mark.slow
def test_a_damaged_header_ends_no_run_and_one_older_than_mlx_is_made_again(tmp_path):
    header, kernel = run(tmp_path)
    header.write_bytes(b"damaged")
    [path] = tmp_path.rglob("*.so")
    path.unlink()
    run(tmp_path)
    assert path.exists() and header.read_bytes() == b"damaged"
    os.utime(header, (0, 0))
    run(tmp_path)
    assert header.stat().st_size > 10**6
