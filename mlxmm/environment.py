"""Environment variables: all that mlxmm reads are read here, when they are needed. docs/environment.md lists them."""

import logging
import os
import sys
from pathlib import Path

from mlxmm.errors import UserError
from mlxmm.escaping import visible

DEFAULT_RANK_TIMEOUT = "600"


def cache_root() -> Path:
    """The folder of everything that is kept between runs: MLXMM_CACHE, or ~/.cache/mlxmm. Raises `UserError`."""
    try:
        return Path(os.environ.get("MLXMM_CACHE") or Path.home() / ".cache" / "mlxmm")
    except RuntimeError:  # a user without a home, as in some containers
        raise UserError("there is no home folder to keep the cache in: name a folder by MLXMM_CACHE") from None


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


def uses_cudnn_attention() -> bool:
    """Whether MLX computes attention on CUDA by cuDNN: unless MLX_CUDA_USE_CUDNN_SDPA=0."""
    return os.environ.get("MLX_CUDA_USE_CUDNN_SDPA") != "0"


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


def rank_secret() -> str | None:
    """What the ranks of a run prove to each other to have: MLXMM_RANK_SECRET, or None."""
    return os.environ.get("MLXMM_RANK_SECRET") or None


def launched_rank() -> int | None:
    """This process's rank, as `mlx.launch` sets it: MLX_RANK. None if it has not started this process."""
    return _number("MLX_RANK", 0) if "MLX_RANK" in os.environ else None


def ring_hostfile() -> Path | None:
    """The file with the addresses of all ranks of a ring, as `mlx.launch` sets it: MLX_HOSTFILE."""
    return Path(os.environ["MLX_HOSTFILE"]) if os.environ.get("MLX_HOSTFILE") else None


def jaccl_devices() -> Path | None:
    """The file with the RDMA devices of all ranks, as `mlx.launch --backend jaccl` sets it: MLX_IBV_DEVICES."""
    return Path(os.environ["MLX_IBV_DEVICES"]) if os.environ.get("MLX_IBV_DEVICES") else None


def jaccl_coordinator() -> str | None:
    """The "ip:port" at which the ranks of JACCL meet, as `mlx.launch` sets it: MLX_JACCL_COORDINATOR."""
    return os.environ.get("MLX_JACCL_COORDINATOR") or None


def nccl_address() -> str | None:
    """The "ip:port" at which the ranks of NCCL meet, as `mlx.launch` sets it: NCCL_HOST_IP and NCCL_PORT."""
    parts = os.environ.get("NCCL_HOST_IP"), os.environ.get("NCCL_PORT")
    return ":".join(part for part in parts if part) if all(parts) else None


def nccl_world_size() -> int:
    """How many ranks NCCL has, as `mlx.launch --backend nccl` sets it: MLX_WORLD_SIZE, or 0."""
    return _number("MLX_WORLD_SIZE", 0)


def num_local_mpi_ranks() -> int:
    """How many ranks Open MPI's mpirun has started on this machine: OMPI_COMM_WORLD_LOCAL_SIZE, or 1."""
    return _number("OMPI_COMM_WORLD_LOCAL_SIZE", 1)


def mpi_share() -> tuple[int, int]:
    """This process's number, from 0, and how many Open MPI's mpirun has started: OMPI_COMM_WORLD_RANK and _SIZE."""
    return _number("OMPI_COMM_WORLD_RANK", 0), _number("OMPI_COMM_WORLD_SIZE", 1)


def slurm_share() -> tuple[int, int] | None:
    """This task's number, from 0, and how many there are: of a job array (SLURM_ARRAY_TASK_ID, _MIN, _COUNT), or of the
    tasks of `srun` (SLURM_PROCID, SLURM_NTASKS); None outside of Slurm, and for a single task."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        first = _number("SLURM_ARRAY_TASK_MIN", 0)
        share = _number("SLURM_ARRAY_TASK_ID", 0) - first, _number("SLURM_ARRAY_TASK_COUNT", 1)
    else:
        share = _number("SLURM_PROCID", 0), _number("SLURM_NTASKS", 1)
    return share if share[1] > 1 else None


def _number(name: str, default: int) -> int:
    """The whole number in a variable; `default` where it is not set, or empty. Raises `UserError`."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={visible(text)}: a whole number is wanted, as the launcher sets it")
    return int(text)


def openai_api_key() -> str | None:
    """The key for OpenAI-compatible servers that ask for one: OPENAI_API_KEY. It is never printed or written."""
    return os.environ.get("OPENAI_API_KEY") or None


def is_first_process() -> bool:
    """Whether this process is not one of `mlx.launch` or `mpirun` other than the first: the one that tells."""
    return not (launched_rank() or mpi_share()[0])


def quiet_libraries() -> None:
    """Keep transformers from remarking that torch is missing, and the Hub's client from drawing bars where there is no
    terminal. They read TRANSFORMERS_VERBOSITY and HF_HUB_DISABLE_PROGRESS_BARS when they are imported. tensorboardX
    would remark on each NaN that it writes, without its name."""
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (sys.stderr and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
