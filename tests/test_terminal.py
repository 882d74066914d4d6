"""What is told, and that telling ends nothing: closed pipes, full disks, terminals without a size."""

import errno
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxmm import commands
from mlxmm.progress_bar import Lines, passing_bar, progress_bar, stage
from mlxmm.terminal import Forgiving, is_terminal, say

ROOT = Path(__file__).parents[1]
# Ctrl-C in the middle of the imports: when the named module is about to be imported.
INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "mlxmm.modules.qwen3_aligner":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


def python(*arguments, **options):
    options = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 60} | options
    return subprocess.run([sys.executable, *map(str, arguments)], **options)


@pytest.fixture
def lines(monkeypatch, capsys):
    monkeypatch.setattr(Lines, "printed", time.monotonic())
    return lambda: capsys.readouterr().err


def test_without_a_terminal_a_line_comes_now_and_then_with_the_rate_and_the_time_left(lines, monkeypatch):
    with progress_bar("caching", 4, "picture") as bar:
        bar.update()
        bar.refresh()
        assert lines() == ""
        monkeypatch.setattr(Lines, "printed", time.monotonic() - 10)
        bar.refresh()
        assert lines() == ""  # what takes less than a second is not worth a line
        bar.opened -= 1
        bar.refresh()
        bar.refresh()
        assert re.fullmatch(r"caching: 1/4, +[\d.]+picture/s, 00:00 left\n", lines())
    assert lines().count("\n") == 1


def test_what_passes_leaves_no_line_and_a_stage_without_end_says_how_long_it_takes(lines, monkeypatch):
    assert list(passing_bar("validation", 3, "batch", "abc")) == list("abc") and lines() == ""
    monkeypatch.setattr(Lines, "printed", time.monotonic() - 10)
    with stage("opening data") as bar:
        assert lines() == ""
        bar.opened -= 1
        bar.refresh()
    assert lines() == "opening data … 00:00\n"


@pytest.mark.parametrize(("size", "is_one"), [((24, 80), True), ((0, 0), False)])
def test_a_terminal_without_a_width_is_none(size, is_one):
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with open(theirs, "w") as stream:
        assert is_terminal(stream) is is_one
    os.close(ours)
    assert not is_terminal(None) and not is_terminal(io.StringIO())


def test_a_bar_in_a_terminal_moves_while_the_program_waits_and_has_no_colours():
    code = (
        "import sys, time\nfrom mlxmm import progress_bar as p\np.TICK = 0.05\n"
        "with p.progress_bar('tower', 9, 'step') as bar:\n    bar.update()\n    time.sleep(0.4)"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "90"}
    done = python("-c", code, capture_output=False, stdout=theirs, stderr=theirs, env=environment)
    told = os.read(ours, 1 << 16).decode()
    assert done.returncode == 0
    if "\r" in told.replace("\r\n", ""):  # the pty has a size
        assert told.count("tower:") >= 4
    assert "\x1b[3" not in told and "\x1b[m" not in told


class Broken(io.StringIO):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


def test_telling_into_a_closed_pipe_is_silent_and_into_a_full_disk_one_warning(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE))
    say("a")
    assert err.getvalue() == ""
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    say("b")
    assert err.getvalue().startswith("warning: standard output cannot be written") and err.getvalue().count("\n") == 1
    Forgiving(Broken(errno.EPIPE)).write("c")


@pytest.mark.parametrize(
    ("where", "code", "told"),
    [("closed pipe", 128 + signal.SIGPIPE, ""), ("/dev/full", 2, "error: No space left on device\n")],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_that_nobody_reads_ends_silently_and_on_a_full_disk_with_one_line(where, code, told, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    if where == "/dev/full":
        out = os.open(where, os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    streams = {"capture_output": False, "stdout": out, "stderr": subprocess.PIPE}
    done = python("-m", "recipes.caption", "--help", env=environment, **streams)
    os.close(out)
    assert (done.returncode, done.stderr) == (code, told)


@pytest.mark.parametrize("called", [["recipes.caption"], ["mlxmm", "caption"]])
def test_ctrl_c_while_python_imports_is_one_line_and_130(called, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT)
    done = python("-m", *called, "--help", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted: nothing was begun\n", "")


def test_a_command_names_the_interpreter_that_runs_by_the_shortest_name_that_works(monkeypatch, tmp_path):
    beside = tmp_path / ".venv/bin"
    beside.mkdir(parents=True)
    for name in ("python", "tensorboard"):
        (beside / name).write_text("")
        (beside / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert commands.command("caption", "a b.png") == ".venv/bin/python -m recipes.caption 'a b.png'"
    assert commands.tool("tensorboard") == ".venv/bin/tensorboard" and commands.tool("mlxmm") is None
    monkeypatch.setenv("PATH", f"{beside}:/usr/bin")
    assert commands.command("caption") == "python -m recipes.caption"
    monkeypatch.chdir("/usr")
    monkeypatch.setenv("PATH", "/usr/bin")
    assert commands.command("caption") == f"{beside}/python -m recipes.caption"


@pytest.mark.parametrize("called", ["-m mlxmm caption", "-m recipes.caption", "script caption"])
def test_a_recipe_knows_that_it_is_one_however_it_is_called(called, tmp_path):
    """So that Ctrl-C ends it with the one line of recipes, and not with that of scripts too."""
    (tmp_path / "sitecustomize.py").write_text(
        "import mlxmm.cli\nfrom mlxmm.commands import is_recipe\nmlxmm.cli.run_recipe = lambda *_: print(is_recipe())\n"
    )
    script = tmp_path / "bin" / "mlxmm"
    script.parent.mkdir()
    script.write_text("from mlxmm.__main__ import main\nmain()\n")
    words = [str(script) if word == "script" else word for word in called.split()]
    command = [sys.executable, *words]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.stdout == "True\n", done


CLOSED = """
import os, runpy, sys
for number in {closed}:
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", "recipes.caption", *sys.argv[1:]])
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_recipe_that_is_started_without_standard_streams_has_its_exit_code(tmp_path, closed):
    code = CLOSED.format(closed=closed)
    assert python("-c", code, "--module", "nobody/here", tmp_path, timeout=100).returncode == 2


OPENED = """
import os, sys
os.close(0)
import mlx.core as mx
from mlxmm import terminal
sys.stdin = None
terminal.open_streams()
mx.save_safetensors(sys.argv[1], {"a": mx.zeros(1)})
print(mx.load(sys.argv[1])["a"].shape, "caf\\u00e9")
"""


def test_arrays_are_read_without_standard_input_and_any_letter_is_printed(tmp_path):
    # MLX takes no file that is number 0 for an open one
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = python("-c", OPENED, tmp_path / "a.safetensors", env=ascii_only)
    assert shown.stdout == "(1,) caf\\xe9\n", shown.stderr
