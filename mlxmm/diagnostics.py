"""What mlxmm finds on this machine. Each section is a function that returns rows; `recipes.doctor` prints them."""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import mlx.core as mx

from mlxmm import environment
from mlxmm.backends import conflict, installed_backends, installed_version
from mlxmm.compute import linux_blas
from mlxmm.compute.compiled import can_compile
from mlxmm.errors import UserError
from mlxmm.storage import hub
from mlxmm.storage.cache import size_of

GIB = 2**30
MIN_FREE = 5 * GIB  # a small CLIP and a small language model, their checkpoints and moments
REQUIRED = ("mlx-lm", "transformers", "datasets", "huggingface_hub")
OPTIONAL = {  # package -> extra of mlxmm, and what it is for
    "tensorboard": ("board", "shows the curves of runs"),
    "scikit-learn": ("probe", "computes linear probes"),
    "mlx-vlm": ("vlm", "runs exported captioners"),
}


@attrs.frozen
class Row:
    """What was found under a name; and what to do about it, where something is missing or wrong."""

    name: str
    value: str
    advice: str | None = None
    broken: bool = False  # training fails, or computes wrongly, as long as this is so


def versions() -> list[Row]:
    """The versions of what training imports, and of what some callbacks and exports need."""
    backends = [Row(name, version) for name, version in installed_backends().items()]
    rows = [
        Row("mlxmm", installed_version("mlxmm") or "not installed: runs from this checkout"),
        Row("Python", platform.python_version()),
        Row("mlx", str(installed_version("mlx")), conflict(), broken=conflict() is not None),
    ]
    return rows + backends + [_required(name) for name in REQUIRED] + [_optional(name) for name in OPTIONAL]


def _required(package: str) -> Row:
    version = installed_version(package)
    advice = None if version else f"pip install {package}: mlxmm needs it"
    return Row(package, version or "not installed", advice, broken=version is None)


def _optional(package: str) -> Row:
    extra, purpose = OPTIONAL[package]
    version = installed_version(package)
    return Row(package, version or "not installed", None if version else f'pip install "mlxmm[{extra}]": it {purpose}')


def device() -> list[Row]:
    """What MLX computes on, whether it does, and the memory of both."""
    info = mx.device_info()
    named = {"max_recommended_working_set_size": "recommended working set", "total_memory": "memory of the GPU"}
    sizes = [Row(label, _gib(info[key])) for key, label in named.items() if key in info]
    memory = Row("memory of the machine", _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    return [
        Row("device", f"{device_kind()}, {info.get('device_name', 'unknown')}", _unused_gpu()),
        memory,
        *sizes,
        _product(),
        _quantized_product(),
    ]


def device_kind() -> str:
    """Metal, CUDA or CPU."""
    if mx.default_device() == mx.cpu:
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def _unused_gpu() -> str | None:
    if device_kind() != "CPU" or not sys.platform.startswith("linux") or shutil.which("nvidia-smi") is None:
        return None
    remove = "".join(f"pip uninstall -y {name}, then " for name in installed_backends())
    return (
        f'{remove}pip install "mlxmm[cuda12]" or "mlxmm[cuda13]": there is an NVIDIA GPU, but MLX computes on the CPU'
    )


def _product() -> Row:
    """A product of two matrices of ones (8, 8) on the device."""
    if (failure := _failure(lambda: mx.all(mx.ones((8, 8)) @ mx.ones((8, 8)) == 8))) is None:
        return Row("product on it", "right")
    advice = f"reinstall MLX and its driver: a small product fails ({failure})"
    return Row("product on it", "fails", advice, broken=True)


def _quantized_product() -> Row:
    """A product with a quantized matrix of ones (64, 64), whose kernel CUDA compiles from NVIDIA's headers."""

    def product():
        weight = mx.quantize(mx.ones((64, 64)), group_size=64, bits=4)
        return mx.allclose(mx.quantized_matmul(mx.ones((64, 64)), *weight, group_size=64, bits=4), mx.array(64.0))

    if (failure := _failure(product)) is None:
        return Row("quantized product on it", "right")
    extra = next(iter(installed_backends()), "mlx").removeprefix("mlx-").replace("cuda-", "cuda")
    advice = f'pip install --upgrade "mlxmm[{extra}]": quantized models cannot be computed ({failure})'
    return Row("quantized product on it", "fails", advice)


def _failure(compute: Callable[[], mx.array]) -> str | None:
    """Why `compute` does not give true; None where it does."""
    try:
        return None if compute().item() else "it is wrong"
    except RuntimeError as error:
        return " ".join(str(error).split())


def computing() -> list[Row]:
    """How fast the same numbers come: BLAS on Linux CPUs, compiled steps."""
    return [_blas(), _compiling()]


def _blas() -> Row:
    status = linux_blas.status() if environment.uses_linux_blas() else "MLX's own, by MLXMM_BLAS=off"
    slow = device_kind() == "CPU" and status.startswith("no provider")
    return Row("BLAS", status, "pip install scipy-openblas32: products are many times as fast" if slow else None)


def _compiling() -> Row:
    compiles = can_compile()
    advice = None if compiles else "install g++ (apt install g++): without it training runs uncompiled, and slower"
    return Row("compiled steps", "yes" if compiles else "no", advice)


def hub_access(*, offline: bool, timeout: float) -> list[Row]:
    """Where the Hub is, whether there is a token, and whether the Hub answers. With `offline` it is not asked."""
    token = None if hub.has_token() else "hf auth login, or set HF_TOKEN: private repositories and uploads need a token"
    rows = [Row("endpoint", hub.endpoint()), Row("token", "none" if token else "there", token)]
    if offline or hub.is_offline():
        return [*rows, Row("answers", "not asked, by --offline" if offline else "not asked, by HF_HUB_OFFLINE")]
    try:
        hub.require_answer(timeout)
    except UserError as error:
        return [*rows, Row("answers", "no", f"check the network, or set HF_HUB_OFFLINE=1 to use the cache: {error}")]
    return [*rows, Row("answers", "yes")]


def disk() -> list[Row]:
    """The caches with their sizes, and what is free where the cache and the runs are written."""
    own, downloads = environment.cache_root(), hub.downloads_folder()
    return [
        _cache("cache of mlxmm", own, "MLXMM_CACHE"),
        _cache("downloads of the Hub", downloads, "HF_HOME"),
        _free("free for the cache", own),
        _free("free for runs here", Path.cwd()),
    ]


def _cache(name: str, folder: Path, variable: str) -> Row:
    place = _existing(folder)
    value = f"{_gib(size_of(folder))} in {folder}"
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Row(name, value)
    advice = f"make {place} a folder that can be written to, or name another one by {variable}"
    return Row(name, value, f"{advice}: {name}", broken=True)


def _free(name: str, folder: Path) -> Row:
    free = shutil.disk_usage(_existing(folder)).free
    advice = None if free > MIN_FREE else f"free some disk space: {_gib(free)} are left for {folder}"
    return Row(name, _gib(free), advice)


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
