"""The cache: what several processes want at once is made by one of them, whatever happens to that one."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlxmm.storage.lock import taking_turns

ROOT = Path(__file__).parents[2]
# Notes in `made` that it makes the entry, and goes on when there is a file `go`.
MAKES = """
import time
from pathlib import Path
from mlxmm.storage.cache import cached

def make(folder):
    (folder / "first").write_bytes(b"a" * 100_000)
    with open("made", "a") as made:
        made.write("made\\n")
    while not Path("go").exists():
        time.sleep(0.01)
    (folder / "second").write_bytes(b"b" * 100_000)

folder = cached("thing", [1], make)
print((folder / "first").read_bytes() + (folder / "second").read_bytes() == b"a" * 100_000 + b"b" * 100_000)
"""
COMPUTES = """
import sys
sys.path[:0] = ["tests", "tests/data"]
from pathlib import Path
import numpy as np
from test_feature_cache import EXPECTED, Rows, compute, pixels
from mlxmm.data.feature_cache import cached_features
rows = Rows()
print(np.array_equal(cached_features(Path(sys.argv[1]), rows, pixels, compute), EXPECTED), rows.reads)
"""


def start(code: str, *arguments, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("first_is_killed", [False, True])
def test_one_process_makes_an_entry_and_the_other_waits_for_it(tmp_path, first_is_killed):
    first, other = (start(MAKES, cwd=tmp_path, env={"MLXMM_CACHE": str(tmp_path / "cache")}) for _ in range(2))
    told, waiting = first_line_of_either(first, other)
    assert told.startswith("another process makes") and len((tmp_path / "made").read_text().splitlines()) == 1
    making = first if waiting is other else other
    if first_is_killed:
        making.kill()
    (tmp_path / "go").touch()
    assert waiting.communicate(timeout=60)[0].splitlines()[-1] == "True"
    assert making.communicate(timeout=60)[0] == ("" if first_is_killed else "True\n")
    assert len((tmp_path / "made").read_text().splitlines()) == 1 + first_is_killed
    assert [path.name[:6] for path in (tmp_path / "cache").iterdir()] == ["thing-"]


def first_line_of_either(*processes: subprocess.Popen) -> tuple[str, subprocess.Popen]:
    ready, _, _ = select.select([process.stdout for process in processes], [], [], 60)
    return ready[0].readline(), next(process for process in processes if process.stdout is ready[0])


def test_one_process_computes_features_and_the_other_finds_them(tmp_path):
    processes = [start(COMPUTES, tmp_path / "features", cwd=ROOT) for _ in range(2)]
    ends = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert sorted(ends) == ["True 1", "True 198"], ends  # one row is read for the shape


def test_a_signal_ends_the_waiting(tmp_path):
    code = "from pathlib import Path; from mlxmm.cli import raised; from mlxmm.storage.lock import taking_turns\n"
    code += "with raised(), taking_turns(Path('thing')): pass"
    with taking_turns(tmp_path / "thing"):
        process = start(code, cwd=tmp_path)
        assert process.stdout.readline().startswith("another process makes thing")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_cache_that_may_be_read_alone_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    with taking_turns(tmp_path / "file/thing"):  # nothing can be made there
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
