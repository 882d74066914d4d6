"""glibc keeps freed memory: a process that frees and takes large arrays again touches no new pages."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import mlxmm
import mlx.core as mx
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        mx.eval([mx.ones((size,)) * i for i in range(20)])  # as the activations of an update
        mx.clear_cache()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2**20), faults(2**24)
print(faults(2**20) + faults(2**24))  # arrays of 4 MiB, and of 64
"""

HELD = """
import mlxmm
import mlx.core as mx
from mlxmm.compute import memory
held = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = held()
arrays = [mx.ones((2**20,)) * i for i in range(100)]
mx.eval(arrays)
last = mx.ones((3,)) * 2  # the end of the heap is in use
mx.eval(last)
del arrays
memory.give_back()
print(held() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is of Linux")
def test_arrays_that_are_freed_and_made_again_touch_no_new_pages():
    run = lambda fast: int(
        subprocess.run(
            [sys.executable, "-c", FAULTS], env=os.environ | {"MLXMM_FAST": fast}, capture_output=True
        ).stdout
    )
    assert run("on") < 1_000 < run("off")  # 20 arrays of 1,024 pages and 20 of 16,384


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is of Linux")
def test_it_gives_memory_back_when_it_is_asked_to():
    run = subprocess.run([sys.executable, "-c", HELD], env=os.environ | {"MLXMM_FAST": "on"}, capture_output=True)
    assert int(run.stdout) < 50e6  # of 400 MiB
