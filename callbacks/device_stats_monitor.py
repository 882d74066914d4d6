"""DeviceStatsMonitor: how much memory MLX and the process hold."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import mlx.core as mx

from mlxmm.training.callback import Callback

MIB = 2**20


class DeviceStatsMonitor(Callback):
    """Logs "memory/…_mib" with the training metrics.

    active: held by arrays; cache: kept by MLX for new arrays; peak: the maximum of active; process: as the operating
    system counts it, on macOS the physical footprint with GPU memory, elsewhere the resident set.
    """

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step % trainer.config.log_every_n_steps == 0:
            sizes = {
                "active": mx.get_active_memory(),
                "cache": mx.get_cache_memory(),
                "peak": mx.get_peak_memory(),
                "process": process_memory(),
            }
            trainer.log({f"memory/{name}_mib": size / MIB for name, size in sizes.items()})


def process_memory() -> int:
    """Bytes of memory that this process holds now."""
    if sys.platform == "darwin":
        return _footprint()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _footprint() -> int:
    usage = (ctypes.c_uint64 * 12)()  # rusage_info_v0 of sys/resource.h: a UUID of 16 bytes, then ten numbers
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, usage):
        raise OSError("proc_pid_rusage gave no figures for this process")
    return usage[9]  # ri_phys_footprint
