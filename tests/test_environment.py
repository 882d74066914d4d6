"""Environment variables of a wrong form, and files that they name: each is one line that names it."""

import json

import pytest

from mlxmm import environment
from mlxmm.distributed import launch
from mlxmm.distributed.meeting import meet
from mlxmm.errors import UserError

NUMBERS = {
    "MLX_RANK": environment.launched_rank,
    "MLX_WORLD_SIZE": environment.nccl_world_size,
    "OMPI_COMM_WORLD_LOCAL_SIZE": environment.num_local_mpi_ranks,
    "OMPI_COMM_WORLD_RANK": environment.mpi_share,
    "OMPI_COMM_WORLD_SIZE": environment.mpi_share,
    "SLURM_PROCID": environment.slurm_share,
    "SLURM_NTASKS": environment.slurm_share,
    "SLURM_ARRAY_TASK_ID": environment.slurm_share,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["two", "-1", "1.5", "\u0662", "1\x1b[2J"])
def test_a_number_of_a_launcher_that_is_none_is_named(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=f"^{name}=[^\x1b]*: a whole number is wanted"):
        NUMBERS[name]()


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_a_launcher_that_is_empty_is_not_set(monkeypatch, name):
    monkeypatch.setenv(name, "")
    NUMBERS[name]()


HOSTS = ["{cut", '{"a": 1}', "[1, 2]", "[[], []]", "[[1], [2]]", '[["127.0.0.1:5000"]]', "[" * 100_000, None]


@pytest.mark.parametrize("text", HOSTS)
def test_a_file_of_hosts_that_is_damaged_is_named(tmp_path, monkeypatch, text):
    path = tmp_path / "hosts.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("MLX_RANK", "1"), monkeypatch.setenv("MLX_HOSTFILE", str(path))
    with pytest.raises(UserError, match="hosts.json") as error:
        launch.read_launch()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("port", ["x", "", "70000"])
def test_an_address_without_a_port_is_named(tmp_path, monkeypatch, port):
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps([[f"127.0.0.1:{port}"]] * 2))
    monkeypatch.setenv("MLX_RANK", "1"), monkeypatch.setenv("MLX_HOSTFILE", str(path))
    with pytest.raises(UserError, match="a port is wanted"):
        meet(launch.read_launch(), 1)


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch):
    monkeypatch.delenv("MLXMM_CACHE"), monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(UserError, match="MLXMM_CACHE"):
        environment.cache_root()
