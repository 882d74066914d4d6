"""MLX's backends on Linux: packages beside `mlx` that each bring mlx/lib/libmlx.so, so that exactly one must be there.

On macOS the one backend, Metal, comes with `mlx`.
"""

import sys

from mlxmm.errors import BackendError

EXTRAS = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda12", "mlx-cuda-13": "cuda13"}  # the same in mlx and in mlxmm


def require_backend() -> None:
    """Raise `BackendError` if MLX is installed on Linux, but cannot be imported: it says what to do.

    Uncaught, the error is printed as one line, as recipes print a `UserError`.
    """
    try:
        import mlx.core  # noqa: F401
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        if not sys.platform.startswith("linux"):
            raise
        sys.excepthook = _print_on_one_line
        raise BackendError(conflict() or _advice(str(error))) from None


def conflict() -> str | None:
    """What to do about several backends, or one of another version than `mlx`; None where all is well."""
    found, version = installed_backends(), installed_version("mlx")
    if len(found) > 1:
        choice = " or ".join(f'"mlxmm[{EXTRAS[name]}]"' for name in found)
        remove = f"pip uninstall -y {' '.join(found)}"
        return f"{remove}, then pip install {choice}: each of these backends overwrites the other's libmlx.so"
    for name, own in found.items():
        if own != version:
            return f'pip install "mlx[{EXTRAS[name]}]=={version}": mlx is {version}, its backend {name} is {own}'
    return None


def installed_backends() -> dict[str, str]:
    """The installed backend packages with their versions; none on macOS, and where MLX was built from source."""
    return {name: version for name in EXTRAS if (version := installed_version(name)) is not None}


def _advice(failure: str) -> str:
    """What to do where `import mlx.core` failed with this message."""
    if not (found := installed_backends()):
        extras = 'pip install "mlxmm[cpu]", or "mlxmm[cuda12]" or "mlxmm[cuda13]" with an NVIDIA GPU'
        return f"{extras}: MLX has no backend on this machine"
    [(name, version)] = found.items()
    if "libcuda.so" in failure:
        step = f'install NVIDIA\'s driver, or: pip uninstall -y {name}, then pip install "mlxmm[cpu]"'
    elif "libmlx.so" in failure:  # its file is gone, as after another backend was uninstalled
        step = f"pip install --force-reinstall --no-deps {name}=={version}"
    else:
        step = f'pip install "mlxmm[{EXTRAS[name]}]"'
    return f"{step}: {name} cannot be loaded ({failure})"


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    from importlib import metadata  # 40 ms: only where something is wrong, or when asked

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print_on_one_line(kind: type[BaseException], error: BaseException, traceback) -> None:
    if issubclass(kind, BackendError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
