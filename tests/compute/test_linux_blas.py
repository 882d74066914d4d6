"""The BLAS slots: faster, right, and left alone whenever something is unfamiliar. Each case in its own process."""

import os
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlxmm.compute import linux_blas

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="patches ELF libraries, so Linux only"),
    pytest.mark.skipif(find_spec("scipy_openblas32") is None, reason='no OpenBLAS: pip install "mlxmm[cpu]"'),
]

ROOT = Path(__file__).parents[2]
# Loads linux_blas.py alone: importing the package enables it.
LOAD = """
import importlib.util, mlx.core as mx
mx.set_default_device(mx.cpu)
spec = importlib.util.spec_from_file_location("linux_blas", "mlxmm/compute/linux_blas.py")
linux_blas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(linux_blas)
slots = lambda: {
    n: linux_blas.ctypes.c_uint64.from_address(a).value
    for n, a in linux_blas.find_slots(linux_blas.read_maps()).items()
}
"""
PATCHED = "scipy-openblas32: 24 symbols"


def run(code, *, python_path="", **environment):
    """What a fresh Python prints."""
    environment = {**os.environ, "MLXMM_BLAS": "on", "PYTHONPATH": str(python_path), **environment}
    command = [sys.executable, "-c", LOAD + textwrap.dedent(code)]
    options = {"cwd": ROOT, "env": environment, "timeout": 120}
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def seconds_of_product(enable: str, **environment):
    return float(
        run(
            f"""
            import time
            {enable}
            x, seconds = mx.random.normal((256, 256)), []
            for _ in range(20):
                start = time.perf_counter()
                mx.eval(x @ x)
                seconds.append(time.perf_counter() - start)
            print(min(seconds))
            """,
            **environment,
        )
    )


def test_products_are_five_times_as_fast():
    # One thread: on a busy machine two wait for each other, and that time says nothing of the library.
    assert 5 * seconds_of_product("linux_blas.enable()", OPENBLAS_NUM_THREADS="1") < seconds_of_product("")


RESULTS_AGREE = """
import numpy as np
normal = np.random.default_rng(0).normal
def close(actual, expected):
    np.testing.assert_allclose(np.array(actual), expected, atol=1e-5 * np.abs(expected).max())
a, b, c = (normal(size=s).astype("f") for s in ((5, 37, 64), (5, 64, 21), (5, 37, 21)))
A, B, C = map(mx.array, (a, b, c))
close(A[0] @ B[0], a[0] @ b[0])
close(A @ B, a @ b)
close(mx.addmm(C, A, B), c + a @ b)
x, w = normal(size=(2, 9, 9, 3)).astype("f"), normal(size=(4, 3, 3, 3)).astype("f")
windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
close(mx.conv2d(mx.array(x), mx.array(w)), np.einsum("bijcuv,ouvc->bijo", windows, w))
s = normal(size=(20, 20)).astype("f") + 5 * np.eye(20, dtype="f")
S, symmetric, cpu = mx.array(s), s + s.T, mx.cpu
u, d, vt = map(np.array, mx.linalg.svd(S, stream=cpu))
close(d, np.linalg.svd(s)[1]); close((u * d) @ vt, s)
q, r = map(np.array, mx.linalg.qr(S, stream=cpu))
close(q @ r, s); close(q.T @ q, np.eye(20))
close(mx.linalg.inv(S, stream=cpu), np.linalg.inv(s))
values, vectors = map(np.array, mx.linalg.eigh(mx.array(symmetric), stream=cpu))
close(values, np.linalg.eigvalsh(symmetric)); close((vectors * values) @ vectors.T, symmetric)
"""


@pytest.mark.parametrize(("call", "status"), [("enable", PATCHED), ("status", "not enabled")])
def test_results_agree_with_numpy(call, status):
    assert run(f"print(linux_blas.{call}())" + RESULTS_AGREE) == status


def test_off_leaves_the_slots():
    code = "before = slots(); import mlxmm; print(mlxmm.linux_blas.status(), slots() == before)"
    assert run(code, MLXMM_BLAS="off") == "not enabled True"
    assert run(code, MLXMM_BLAS="on") == f"{PATCHED} False"


def test_every_slot_changes():
    assert run("before = slots(); linux_blas.enable(); print(sum(slots()[n] != before[n] for n in before))") == "24"


def test_importing_changes_nothing():
    assert run("print(linux_blas.status())") == "not enabled"


def test_enabling_twice_is_harmless():
    code = """first = linux_blas.enable(); held = slots()
print(first == linux_blas.enable() == linux_blas.status(), held == slots())"""
    assert run(code) == "True True"


def test_works_after_mlx_was_used():
    code = "x = mx.ones((8, 8)); mx.eval(x @ x); print(linux_blas.enable(), (x @ x)[0, 0].item())"
    assert run(code) == f"{PATCHED} 8.0"


def test_enabling_runs_no_mlx_operation():
    """MLX starts a thread for a device at its first operation there; OpenBLAS has its own, one a core."""
    code = """
    import os
    linux_blas.ctypes.CDLL(linux_blas._provider_path())
    before = len(os.listdir("/proc/self/task"))
    linux_blas.enable()
    after = len(os.listdir("/proc/self/task"))
    mx.eval(mx.ones(3) + 1)
    print(after - before, len(os.listdir("/proc/self/task")) > after)
    """
    assert run(code) == "0 True"


def test_page_protection_is_as_before():
    code = """
    protection = lambda: [m[:3] for m in linux_blas.read_maps() if m.path.endswith("/libmlx.so")]
    before = protection()
    print(linux_blas.enable(), protection() == before)
    """
    assert run(code) == f"{PATCHED} True"


def test_read_only_memory_is_written_and_read_only_again():
    code = """
    import ctypes, mmap
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    permissions = lambda: linux_blas._mapping_at(address, linux_blas.read_maps()).permissions[:3]
    linux_blas._protect(address, address + 16, mmap.PROT_READ)
    linux_blas.overwrite({address: 7, address + 8: 9})
    print(permissions(), list(ctypes.c_uint64.from_address(address + o).value for o in (0, 8)))
    """
    assert run(code) == "r-- [7, 9]"


def test_the_number_of_threads_can_be_set():
    code = """
    linux_blas.set_num_threads(1)
    linux_blas.enable()
    linux_blas.set_num_threads(1)
    print(linux_blas._provider.scipy_openblas_get_num_threads())
    """
    assert run(code) == "1"


def test_without_a_provider_it_says_what_to_install():
    code = """
    import sys
    sys.path[:] = [p for p in sys.path if "site-packages" not in p]
    before = slots()
    print(linux_blas.enable(), slots() == before)
    """
    assert run(code) == "no provider: pip install scipy-openblas32 True"


# ---- surprises


@pytest.fixture
def copied_mlx(tmp_path):
    """A folder, with a space in its name, that has MLX and its libraries."""
    import mlx.core as mx

    site_packages = Path(mx.__file__).parents[1]
    for name in ("mlx", "mlx_cpu.libs"):
        if not (site_packages / name).exists():
            pytest.skip(f"this MLX has no {name}")
        shutil.copytree(site_packages / name, tmp_path / "site packages" / name)
    return tmp_path / "site packages"


def test_works_from_a_path_with_spaces(copied_mlx):
    code = "print(linux_blas.enable(), 'site packages' in mx.__file__)"
    assert run(code, python_path=copied_mlx) == f"{PATCHED} True"


def test_a_library_of_another_machine_is_left_alone(copied_mlx):
    code = """
    before = slots()
    with open(linux_blas.Path(mx.__file__).parent / "lib/libmlx.so", "r+b") as file:
        file.seek(18)  # e_machine, which nobody reads again once the library is loaded
        file.write(bytes([243, 0]))  # RISC-V
    said = linux_blas.enable()
    after = None
    with open(linux_blas.Path(mx.__file__).parent / "lib/libmlx.so", "r+b") as file:
        file.seek(18)
        file.write(bytes([62 if linux_blas.os.uname().machine == "x86_64" else 183, 0]))
    print(said, slots() == before, (mx.ones((2, 2)) @ mx.ones((2, 2))).tolist())
    """
    expected = "left alone: ELF for machine 243, neither x86_64 nor aarch64 True [[2.0, 2.0], [2.0, 2.0]]"
    assert run(code, python_path=copied_mlx) == expected


@pytest.fixture(scope="module")
def library():
    import mlx.core as mx

    return (Path(mx.__file__).parent / "lib" / "libmlx.so").read_bytes()


@pytest.mark.parametrize(
    ("start", "bytes_"),
    [
        (0, b"\x7fELG"),
        (4, b"\x01"),
        (5, b"\x02"),
        (16, b"\x02\0"),
        (18, b"\xf3\0"),
        (32, b"\xff" * 8),
        (56, b"\0\0"),
    ],
    ids=["magic", "32-bit", "big-endian", "executable", "machine", "header-offset", "no-headers"],
)
def test_a_corrupted_header_is_a_surprise(library, tmp_path, start, bytes_):
    corrupted = tmp_path / "libmlx.so"
    corrupted.write_bytes(library[:start] + bytes_ + library[start + len(bytes_) :])
    with pytest.raises(linux_blas.UnsupportedLayout):
        linux_blas.read_jump_slots(corrupted)


@pytest.mark.parametrize("size", [1, 20, 100, 4096, 1_000_000])
def test_a_truncated_library_is_a_surprise(library, tmp_path, size):
    (tmp_path / "libmlx.so").write_bytes(library[:size])
    with pytest.raises(linux_blas.UnsupportedLayout):
        linux_blas.read_jump_slots(tmp_path / "libmlx.so")


def test_a_library_without_blas_has_no_slots():
    import _ctypes

    assert linux_blas.read_jump_slots(_ctypes.__file__) == {}
