"""What `mlx.launch` tells a process: the backend, its rank, and where all ranks can meet.

The variables are those of mlx's python/mlx/_distributed_utils/launch.py. `mpirun` sets none of them.
"""

import json
from collections import Counter
from pathlib import Path

import attrs

from mlxmm import environment
from mlxmm.errors import UserError


@attrs.frozen
class Launch:
    """One of `size` processes that `mlx.launch` has started with `backend`."""

    backend: str  # "ring", "jaccl" or "nccl"
    rank: int
    size: int
    address: str  # "ip:port" of rank 0, free until MLX's own processes meet there
    num_local: int = 1  # ranks on this machine; only a ring tells


def read_launch() -> Launch | None:
    """What the environment says, in MLX's order of backends; None for a single process and under `mpirun`. Raises
    `UserError`."""
    rank = environment.launched_rank()
    if rank is None:
        return None
    launch = _nccl(rank) or _ring(rank) or _jaccl(rank)
    return launch if launch and launch.size > 1 else None


def _nccl(rank: int) -> Launch | None:
    address, size = environment.nccl_address(), environment.nccl_world_size()
    return Launch("nccl", rank, size, address) if address and size else None


def _ring(rank: int) -> Launch | None:
    hosts = _read_json(environment.ring_hostfile())  # for each rank its "ip:port" addresses
    if not hosts:
        return None
    are_addresses = all(isinstance(host, list) and host and isinstance(host[0], str) for host in hosts)
    if not are_addresses or rank >= len(hosts):
        raise UserError(f"MLX_HOSTFILE={environment.ring_hostfile()} does not list the addresses of rank {rank}")
    ips = [addresses[0].rpartition(":")[0] for addresses in hosts]
    return Launch("ring", rank, len(hosts), hosts[0][0], Counter(ips)[ips[rank]])


def _jaccl(rank: int) -> Launch | None:
    devices, address = _read_json(environment.jaccl_devices()), environment.jaccl_coordinator()
    return Launch("jaccl", rank, len(devices), address) if devices and address else None


def _read_json(path: Path | None) -> list:
    """The list in a file of the launcher's; empty without one. Raises `UserError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8").strip() or "[]") if path else []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}, which the launcher names, cannot be read: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}, which the launcher names, holds no list of ranks")
    return values
