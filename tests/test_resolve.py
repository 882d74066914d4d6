"""tools/resolve_dependencies.py: what it asks of uv, and what it refuses. uv is played here: it needs a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMON = "attrs==26.1\nmlx==0.32.4\nmlx-lm==0.32.2\ntransformers==5.24.0\n"
PLAYED = """
import sys, json, os
arguments, requirements = sys.argv[1:], sys.stdin.read().splitlines()
with open("log", "a") as log:
    log.write(json.dumps([arguments, requirements, os.environ["MACOSX_DEPLOYMENT_TARGET"]]) + "\\n")
"""


@pytest.fixture
def resolve(tmp_path):
    def run(answer: str) -> subprocess.CompletedProcess:
        """Run the tool; uv is `answer`, a piece of Python that knows `arguments` and `requirements`."""
        (tmp_path / "uv.py").write_text(PLAYED + answer)
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        command = [sys.executable, ROOT / "tools/resolve_dependencies.py"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    return run


ONE_EACH = f"""
backend = next((line[4:].split("]")[0] for line in requirements if line.startswith("mlx[")), "metal")
names = {{"cpu": "mlx-cpu", "cuda12": "mlx-cuda-12", "cuda13": "mlx-cuda-13", "metal": "mlx-metal"}}
print({COMMON!r} + names[backend] + "==0.32.4")
"""


def test_each_machine_and_python_gets_a_line_with_the_versions(resolve, tmp_path):
    done = resolve(ONE_EACH)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 16 == len((tmp_path / "log").read_text().splitlines())
    assert lines[0] == (
        "macOS 14 arm64, Python 3.11: mlx 0.32.4, mlx-metal 0.32.4, mlx-lm 0.32.2, transformers 5.24.0; 5 packages"
    )
    assert lines[-1].startswith("Linux x86_64 [cuda13], Python 3.14: mlx 0.32.4, mlx-cuda-13 0.32.4, ")


def test_two_backends_in_one_resolution_fail(resolve):
    done = resolve(ONE_EACH + "print('mlx-cpu==0.32.4' if backend == 'cuda12' else '')")
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if "WRONG" in line]
    assert len(wrong) == 4 and all("[cuda12]" in line and "2 backends: mlx-cpu, mlx-cuda-12" in line for line in wrong)


def test_a_platform_without_a_solution_fails_with_what_uv_says(resolve):
    done = resolve("import sys; sys.exit('error: No solution found')")
    assert done.returncode == 1 and done.stdout.count("WRONG: error: No solution found") == 16
