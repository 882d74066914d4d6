"""The doctor reports what is there, says what to do about what is not, and exits with 1 if training cannot work."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from mlxmm import diagnostics
from mlxmm.backends import installed_backends

ROOT = Path(__file__).parents[2]
SECRET = "hf_secretsecretsecret"


@pytest.fixture
def doctor(tmp_path):
    def run(*flags: str, path: str = "", **environment: str) -> subprocess.CompletedProcess:
        """The report, with caches of its own and no token."""
        own = {"MLXMM_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        variables |= own | {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)]))} | environment
        command = [sys.executable, "-m", "recipes.doctor", *flags]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def hub():
    """The address of a server that answers every question about its first page."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def values(report: str) -> dict[str, str]:
    """The rows of a report."""
    rows = [line.strip().split("  ", 1) for line in report.splitlines() if line.startswith("  ")]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def test_the_report_names_versions_device_speed_hub_and_disk(doctor, hub, tmp_path):
    (tmp_path / "cache/folder").mkdir(parents=True)
    (tmp_path / "cache/folder/file").write_bytes(bytes(2**28))
    done = doctor(HF_ENDPOINT=hub, HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stdout + done.stderr
    found = values(done.stdout)
    assert found["mlx"] == mx.__version__ and {"mlx-lm", "transformers", "datasets", "huggingface_hub"} <= set(found)
    assert found["product on it"] == found["quantized product on it"] == "right"
    assert found["memory of the machine"].endswith(" GiB")
    assert found["device"].split(",")[0] in ("CPU", "Metal", "CUDA") and "compiled steps" in found and "BLAS" in found
    assert (found["endpoint"], found["token"], found["answers"]) == (hub, "there", "yes")
    assert found["cache of mlxmm"] == f"0.2 GiB in {tmp_path / 'cache'}"
    assert found["downloads of the Hub"] == f"0.0 GiB in {tmp_path / 'hub/hub'}"
    assert SECRET not in done.stdout + done.stderr


def test_a_hub_that_does_not_answer_and_a_missing_token_are_lines_that_say_what_to_do(doctor):
    done = doctor(HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0 and values(done.stdout)["answers"] == "no"
    advice = done.stdout.split("To do, if you need it:\n")[1].splitlines()
    assert "  hf auth login, or set HF_TOKEN: private repositories and uploads need a token" in advice
    line = "  check the network, or set HF_HUB_OFFLINE=1 to use the cache: http://127.0.0.1:9 does not answer: "
    assert [each for each in advice if each.startswith(line)]


@pytest.mark.parametrize(("flags", "variable"), [(["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})])
def test_offline_nobody_is_asked(doctor, flags, variable):
    done = doctor(*flags, HF_ENDPOINT="http://127.0.0.1:9", **variable)
    assert values(done.stdout)["answers"] == f"not asked, by {[*flags, *variable][0]}"
    assert "check the network" not in done.stdout


def test_where_nothing_is_known_of_the_presets_one_line_says_so(doctor):
    done = doctor("--offline")
    [line] = done.stdout.split("Presets of align_qwen3:\n")[1].split("\n\n")[0].splitlines()
    assert line.split("not known: ")[1].startswith("openai/clip-vit-base-patch32 is no folder here, and not to be had")


@pytest.mark.skipif("mlx-cuda-13" in installed_backends(), reason="there are three")
def test_two_backends_are_broken_and_exit_with_1(doctor, tmp_path):
    for name in ("mlx_cpu", "mlx_cuda_12"):
        folder = tmp_path / f"packages/{name}-{mx.__version__}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {mx.__version__}\n")
    done = doctor("--offline", path=str(tmp_path / "packages"))
    assert done.returncode == 1, done.stdout + done.stderr
    line = 'pip uninstall -y mlx-cpu mlx-cuda-12, then pip install "mlxmm[cpu]" or "mlxmm[cuda12]": '
    assert f"To do, or training fails:\n  {line}" in done.stdout


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="only on CPUs does MLX compile with g++")
def test_without_a_compiler_it_says_what_to_install(doctor, tmp_path):
    done = doctor("--offline", PATH=str(tmp_path))
    assert done.returncode == 0 and values(done.stdout)["compiled steps"] == "no"
    assert "  install g++ (apt install g++): without it training runs uncompiled, and slower\n" in done.stdout
    assert done.stderr == ""


def test_missing_packages_say_what_to_install_and_those_that_training_imports_are_broken(monkeypatch):
    monkeypatch.setattr(diagnostics, "REQUIRED", ("no-such-package",))
    monkeypatch.setitem(diagnostics.OPTIONAL, "no-such-extra", ("probe", "computes linear probes"))
    rows = {row.name: row for row in diagnostics.versions()}
    required, optional = rows["no-such-package"], rows["no-such-extra"]
    assert (required.advice, required.broken) == ("pip install no-such-package: mlxmm needs it", True)
    assert (optional.advice, optional.broken) == ('pip install "mlxmm[probe]": it computes linear probes', False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_broken(doctor, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o555)
    done = doctor("--offline")
    assert done.returncode == 1 and f"make {tmp_path / 'cache'} a folder that can be written to" in done.stdout


def test_a_file_in_the_place_of_the_cache_is_broken(doctor, tmp_path):
    (tmp_path / "cache").touch()
    done = doctor("--offline")
    assert done.returncode == 1 and f"make {tmp_path / 'cache'} a folder that can be written to" in done.stdout


def test_a_full_disk_is_a_line_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(diagnostics, "MIN_FREE", float("inf"))
    advice = [row.advice for row in diagnostics.disk() if row.name.startswith("free")]
    assert len(advice) == 2 and all(line.startswith("free some disk space: ") for line in advice)
