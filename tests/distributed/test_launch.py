"""What `mlx.launch` tells a process, for each backend, and what follows from it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlxmm.distributed import collectives, watchdog
from mlxmm.distributed.collectives import agreement_device, num_local_ranks
from mlxmm.distributed.launch import Launch, read_launch

ROOT = Path(__file__).parents[2]
VARIABLES = "MLX_RANK MLX_HOSTFILE MLX_IBV_DEVICES MLX_JACCL_COORDINATOR NCCL_HOST_IP NCCL_PORT MLX_WORLD_SIZE".split()
RING = [["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002"], ["10.0.0.2:5003"]]
RDMA = [[None, "rdma_en5"], ["rdma_en4", None]]


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Sets the variables of `mlx.launch`; a list is written to a file that the variable names, as it does."""

    def set_variables(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            if isinstance(value, list):
                (tmp_path / name).write_text(json.dumps(value) + "\n")
            monkeypatch.setenv(name, str(tmp_path / name) if isinstance(value, list) else value)
        return read_launch()

    return set_variables


def test_each_backend_s_variables_give_rank_size_and_the_address_of_rank_0(launched):
    ring = launched(MLX_RANK="2", MLX_HOSTFILE=RING)
    assert ring == Launch("ring", 2, 3, "10.0.0.1:5000", num_local=2) and num_local_ranks() == 2
    jaccl = launched(MLX_RANK="1", MLX_IBV_DEVICES=RDMA, MLX_JACCL_COORDINATOR="10.0.0.1:32323")
    assert jaccl == Launch("jaccl", 1, 2, "10.0.0.1:32323") and num_local_ranks() == 1
    nccl = launched(MLX_RANK="3", NCCL_HOST_IP="10.0.0.1", NCCL_PORT="12345", MLX_WORLD_SIZE="4")
    assert nccl == Launch("nccl", 3, 4, "10.0.0.1:12345") and num_local_ranks() == 1


def test_a_single_process_and_mpirun_are_no_launch(launched, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    assert launched() is None and num_local_ranks() == 4
    assert launched(MLX_RANK="0", MLX_HOSTFILE="") is None  # as `mlx.launch -n 1` sets it
    assert launched(MLX_RANK="0", MLX_HOSTFILE=[["127.0.0.1:5000"]]) is None
    assert launched(MLX_RANK="0", NCCL_HOST_IP="10.0.0.1", NCCL_PORT="12345", MLX_WORLD_SIZE="1") is None


def test_agreements_are_computed_on_the_cpu_except_with_nccl():
    devices = {name: agreement_device(Launch(name, 0, 2, "10.0.0.1:1")) for name in ("ring", "jaccl", "nccl")}
    assert devices == {"ring": mx.Device(mx.cpu), "jaccl": mx.Device(mx.cpu), "nccl": mx.Device(mx.gpu)}
    assert agreement_device(None) == mx.Device(mx.cpu)


def meet_and_die():
    """The watchdog of a launch, without MLX's own connections."""
    launched = read_launch()
    watchdog.gather(launched)
    if launched.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def form_group():
    print(collectives.world_size())


def run_two(name, backend, folder):
    """stderr of both ranks of a process of this file, started as `mlx.launch --backend BACKEND` would."""
    (folder / "devices").write_text(json.dumps(RDMA))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    told = {
        "jaccl": {"MLX_IBV_DEVICES": str(folder / "devices"), "MLX_JACCL_COORDINATOR": f"127.0.0.1:{port}"},
        "nccl": {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": port, "MLX_WORLD_SIZE": "2"},
    }[backend]
    settings = os.environ | told | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, name]
    start = lambda rank: subprocess.Popen(
        command, env=settings | {"MLX_RANK": rank}, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    return [process.communicate(timeout=40)[1] for process in [start("0"), start("1")]]


@pytest.mark.parametrize("backend", ["jaccl", "nccl"])
def test_the_watchdog_of_every_backend_names_a_rank_that_died(tmp_path, backend):
    assert run_two("meet_and_die", backend, tmp_path)[0] == "error: rank 1 died\n"


@pytest.mark.parametrize("backend", ["jaccl", "nccl"])
def test_a_backend_that_mlx_lacks_is_one_clear_line_and_not_two_runs_of_one_process(tmp_path, backend):
    if mx.distributed.is_available(backend):
        pytest.skip(f"MLX has {backend}")
    for told in run_two("form_group", backend, tmp_path):
        assert told.splitlines()[-1].endswith(f"--backend {backend}, which MLX does not have here: use ring")


ORPHAN = """
import signal, sys, time
from pathlib import Path
from mlxmm.distributed.signals import Ended
from mlxmm.distributed.watchdog import TICK, Watchdog
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(Path(sys.argv[2]).write_text("asked")))
watchdog = Watchdog(0, [], 60)
if sys.argv[1] == "ends":
    watchdog.note(Ended(signal.SIGTERM))  # as a signal that another rank got first
print("here", flush=True)
time.sleep(8 * TICK)
Path(sys.argv[2]).write_text("left alone")
"""


@pytest.mark.parametrize(("how", "then"), [("works", "asked"), ("ends", "left alone")])
def test_a_rank_whose_launcher_is_gone_is_asked_to_end_unless_it_ends_already(tmp_path, how, then):
    launcher = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE).stdout.readline())"
    command = [sys.executable, "-c", launcher, sys.executable, "-c", ORPHAN, how, str(tmp_path / "told")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    deadline = time.monotonic() + 30
    while not (tmp_path / "told").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "told").read_text() == then


if __name__ == "__main__":
    globals()[sys.argv[1]]()
