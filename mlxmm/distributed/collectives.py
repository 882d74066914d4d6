"""Collective operations of the processes that train one module. A single process is a group of one.

Processes are numbered by rank, from 0. Every function except `rank`, `world_size`, `num_local_ranks`,
`cores_per_process`, `watched` and `off_gpu` is a collective call: all processes must make it, in the same order.

Agreements (`all_max`, `barrier`, `broadcast`, …) stay off the GPU: Metal ends work that waits for seconds, as if it
hung. `all_sum` and `all_gather` are for what is computed on the GPU, in its graph.
"""

import contextlib
import faulthandler
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxmm import environment
from mlxmm.compute import linux_blas
from mlxmm.distributed import launch, watchdog
from mlxmm.errors import UserError

GROUP_BYTES = 32 * 1024**2  # size of one all_sum, as in mlx.nn.average_gradients
START_SECONDS = 60  # limit for MLX's own connections, once all processes have started

_watchdog: watchdog.Watchdog | None = None
_is_alone = False


class Alone:
    """A group of one process, which MLX knows nothing of."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def work_alone() -> tuple[int, int]:
    """Make this process a group of one, whoever was launched with it, for work that needs no other process.

    Returns its number, from 0, and how many there are: ranks of `mlx.launch` or `mpirun`, or tasks of Slurm. Before
    anything else of this file is called.
    """
    global _is_alone
    launched, _is_alone = launch.read_launch(), True
    if launched is not None:
        return launched.rank, launched.size
    return environment.slurm_share() or environment.mpi_share()


@functools.cache
def _group() -> mx.distributed.Group | Alone:
    global _watchdog
    launched = launch.read_launch()
    _share_cores()
    if _is_alone or (launched is None and environment.launched_rank() is not None):
        return Alone()  # `mlx.launch -n 1` names an empty file, which MLX cannot read
    if launched is None:
        return mx.distributed.init()
    if not mx.distributed.is_available(launched.backend):
        raise UserError(f"mlx.launch was given --backend {launched.backend}, which MLX does not have here: use ring")
    _watchdog = watchdog.gather(launched)
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)  # `init` keeps the GIL: no thread of Python's can help
    try:
        return mx.distributed.init(strict=True, backend=launched.backend)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _share_cores() -> None:
    """Divide the cores among the ranks of this machine: BLAS threads that share a core wait for each other."""
    if num_local_ranks() > 1 and not environment.blas_threads_are_set():
        linux_blas.set_num_threads(cores_per_process())


def num_local_ranks() -> int:
    """How many of the processes run on this machine; 1 with JACCL and NCCL, whose launcher does not tell."""
    launched = launch.read_launch()
    return environment.num_local_mpi_ranks() if launched is None else launched.num_local


def cores_per_process() -> int:
    """This process's share of the machine's cores, at least 1."""
    return max(1, (os.cpu_count() or 1) // num_local_ranks())


def rank() -> int:
    """The number of this process, from 0."""
    return _group().rank()


def world_size() -> int:
    """How many processes train together."""
    return _group().size()


def enter_collective() -> None:
    """Announce that this rank enters a collective operation. Raises `PeerLost` if another rank has failed."""
    if _watchdog is not None:
        _watchdog.enter_collective()


@contextlib.contextmanager
def watched(waits: bool = True) -> Iterator[None]:
    """Report an exception in the block to the other ranks; with `waits`, the rank timeout applies inside it."""
    if waits and _watchdog is not None:
        _watchdog.me.waits = True
    try:
        yield
    except BaseException as error:
        if _watchdog is not None:
            _watchdog.note(error)
        raise
    finally:
        if waits and _watchdog is not None:
            _watchdog.me.waits = False


def agreement_device(launched: launch.Launch | None) -> mx.Device:
    """Where agreements are computed: on the CPU, or on the GPU with NCCL, which has nothing else."""
    return mx.Device(mx.gpu if launched is not None and launched.backend == "nccl" else mx.cpu)


@functools.cache
def _own_agreement_device() -> mx.Device:
    return agreement_device(launch.read_launch())


def off_gpu() -> contextlib.AbstractContextManager:
    """Within the block, MLX computes where agreements are computed."""
    return mx.stream(_own_agreement_device())


def all_sum(tree):
    """Add every array of `tree` across processes. Small arrays are sent together."""
    if world_size() == 1:
        return tree
    arrays: list[mx.array] = []
    tree_map(arrays.append, tree)
    summed: dict[int, mx.array] = {}
    for group in _groups(arrays):
        flat = mx.distributed.all_sum(mx.concatenate([arrays[i].reshape(-1) for i in group]))
        ends = np.cumsum([arrays[i].size for i in group])[:-1].tolist()
        summed |= {i: part.reshape(arrays[i].shape) for i, part in zip(group, mx.split(flat, ends))}
    order = iter(range(len(arrays)))
    return tree_map(lambda _: summed[next(order)], tree)


def _groups(arrays: list[mx.array]) -> Iterator[list[int]]:
    """Indices of the arrays that are sent together: of one dtype, up to about `GROUP_BYTES`."""
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        group, size = [], 0
        for i, array in enumerate(arrays):
            if array.dtype == dtype:
                group, size = [*group, i], size + array.nbytes
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group


def all_gather(array: mx.array) -> mx.array:
    """Concatenate (B, ...) arrays of all processes, in rank order, to (world_size * B, ...).

    This rank's part receives the gradient summed over every rank's loss (MLX's own: of this rank's loss only).
    """
    if world_size() == 1:
        return array
    gather = mx.custom_function(mx.distributed.all_gather)
    own = slice(rank() * len(array), (rank() + 1) * len(array))
    gather.vjp(lambda primal, cotangent, _: mx.distributed.all_sum(cotangent)[own])  # a ring has no sum_scatter
    return gather(array)


def all_gather_object(value) -> list:
    """The values (JSON) of all processes, in rank order."""
    if world_size() == 1:
        return [value]
    enter_collective()
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with off_gpu():
        lengths = mx.distributed.all_gather(mx.array([len(data)])).tolist()
        padded = np.zeros(max(lengths), np.uint8)
        padded[: len(data)] = data
        rows = np.array(mx.distributed.all_gather(mx.array(padded))).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths)]


def all_max(*numbers: int) -> list[int]:
    """The maximum over processes of each of the numbers."""
    if world_size() == 1:
        return list(numbers)
    enter_collective()
    with off_gpu():
        return mx.distributed.all_max(mx.array(numbers, dtype=mx.int32)).tolist()


def lockstep(items: Iterable) -> Iterator[tuple]:
    """Yield (item, True); a rank that runs out early repeats its last item with False, so that all ranks make equally
    many collective calls. Raises `UserError` on a rank without items."""
    rest, item = iter(items), None
    while all_max((new := next(rest, None)) is not None) == [1]:
        item = item if new is None else new
        if item is None:
            raise UserError(f"rank {rank()} has no batch where others have some: make shards equal, or use ddp")
        yield item, new is not None


def barrier() -> None:
    """Wait until all processes have called this."""
    all_max(0)


def broadcast(tree):
    """The arrays of rank 0, to the bit, on every process. Shapes and dtypes must agree."""
    if world_size() == 1:
        return tree
    mx.eval(tree)  # on the GPU, which then has nothing to wait for
    enter_collective()
    with off_gpu():
        flat = tree_map(lambda x: x.reshape(-1).view(mx.uint8), tree)  # as bytes: in floats, -0.0 + 0.0 is 0.0
        summed = all_sum(flat if rank() == 0 else tree_map(mx.zeros_like, flat))
        same = tree_map(lambda x, bytes: bytes.view(x.dtype).reshape(x.shape), tree, summed)
        mx.eval(same)
    return same


def broadcast_object(make: Callable):
    """What `make()` returns on rank 0 (JSON values), on every process; the others wait for it."""
    return all_gather_object(make() if rank() == 0 else None)[0]


def rank_zero_first(make: Callable):
    """What `make()` returns on this process. The others call it once rank 0 has: they find what it downloaded."""
    if rank() == 0:
        made = make()
        barrier()
        return made
    barrier()
    return make()


def broadcast_paths(make: Callable[[], Sequence[Path | None]]) -> list[Path | None]:
    """The paths that `make()` returns on rank 0. Raises `UserError` on a process that cannot see one of them."""
    paths = [text and Path(text) for text in broadcast_object(lambda: [path and str(path) for path in make()])]
    if rank() > 0 and (unseen := [str(path) for path in paths if path and not path.exists()]):
        raise UserError(f"rank {rank()} does not see {unseen[0]}: it must be on storage that all machines share")
    return paths


def check_strategy(strategy: str) -> None:
    """Raise `UserError` if the processes cannot train with this `strategy`."""
    if strategy != "fsdp":
        return
    if world_size() == 1:
        raise UserError("strategy fsdp shards a module over processes, and there is only one: use auto, or mlx.launch")
    try:
        mx.eval(mx.distributed.sum_scatter(mx.ones((world_size(), 1))))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"strategy fsdp needs sum_scatter, which this backend lacks ({error}): use ddp") from None
