"""glibc keeps freed memory: a process that frees and takes large arrays again touches no new pages."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import mlxmm
import mlx.core as mx
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        mx.eval([mx.ones((2**20,)) * i for i in range(20)])  # 80 MiB at a time, as the activations of an update
        mx.clear_cache()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is of Linux")
def test_arrays_that_are_freed_and_made_again_touch_no_new_pages():
    run = lambda fast: int(
        subprocess.run(
            [sys.executable, "-c", FAULTS], env=os.environ | {"MLXMM_FAST": fast}, capture_output=True
        ).stdout
    )
    assert run("on") < 1_000 < run("off")  # 20 arrays of 1,024 pages
