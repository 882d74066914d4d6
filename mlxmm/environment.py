"""Environment variables: all that mlxmm reads are read here, when they are needed. docs/environment.md lists them."""

import os
from pathlib import Path

from mlxmm.errors import UserError

DEFAULT_RANK_TIMEOUT = "600"


def cache_root() -> Path:
    """The folder of everything that is kept between runs: MLXMM_CACHE, or ~/.cache/mlxmm."""
    return Path(os.environ.get("MLXMM_CACHE") or Path.home() / ".cache" / "mlxmm")


def uses_linux_functions() -> bool:
    """Whether the faster forms of activations and attention for Linux CPUs are wanted: unless MLXMM_FAST=off."""
    return os.environ.get("MLXMM_FAST") != "off" and not acts_as_gpu()


def acts_as_gpu() -> bool:
    """Whether a CPU is to take the decisions of a GPU, for tests: with MLXMM_ACT_AS=gpu."""
    return os.environ.get("MLXMM_ACT_AS") == "gpu"


def uses_linux_blas() -> bool:
    """Whether MLX is given OpenBLAS on Linux CPUs: unless MLXMM_BLAS=off."""
    return os.environ.get("MLXMM_BLAS") != "off"


def blas_threads_are_set() -> bool:
    """Whether OPENBLAS_NUM_THREADS says how many threads OpenBLAS has: then ranks do not divide the cores."""
    return "OPENBLAS_NUM_THREADS" in os.environ


def rank_timeout() -> float:
    """Seconds for which ranks wait for one another: MLXMM_RANK_TIMEOUT, or 600. Raises `UserError`."""
    text = os.environ.get("MLXMM_RANK_TIMEOUT", DEFAULT_RANK_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"MLXMM_RANK_TIMEOUT={text}: give a number of seconds above 0")
    return seconds


def ring_rank() -> int | None:
    """This process's rank in a ring, as `mlx.launch` sets it: MLX_RANK. None outside of a ring."""
    return int(os.environ["MLX_RANK"]) if "MLX_RANK" in os.environ else None


def ring_hostfile() -> Path | None:
    """The file with the addresses of all ranks of a ring, as `mlx.launch` sets it: MLX_HOSTFILE."""
    return Path(os.environ["MLX_HOSTFILE"]) if os.environ.get("MLX_HOSTFILE") else None


def num_local_mpi_ranks() -> int:
    """How many ranks Open MPI's mpirun has started on this machine: OMPI_COMM_WORLD_LOCAL_SIZE, or 1."""
    return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))


def openai_api_key() -> str | None:
    """The key for OpenAI-compatible servers that ask for one: OPENAI_API_KEY. It is never printed or written."""
    return os.environ.get("OPENAI_API_KEY") or None


def quiet_transformers() -> None:
    """Keep transformers from remarking that torch is missing. It reads TRANSFORMERS_VERBOSITY when it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
