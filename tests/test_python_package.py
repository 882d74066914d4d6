"""The package itself: its version, and bars in a notebook."""

import configparser
import io
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tqdm import tqdm

import mlxmm
from mlxmm.progress_bar import in_notebook, progress_bar

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_clone_also_where_another_one_is_installed(tmp_path):
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert mlxmm.__version__ == settings["metadata"]["version"]
    (tmp_path / "mlxmm-9.9.dist-info").mkdir()
    (tmp_path / "mlxmm-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mlxmm\nVersion: 9.9\n")
    code = "import sys, mlxmm, importlib.metadata as m; print(mlxmm.__version__, m.version('mlxmm'))"
    where = {"cwd": tmp_path, "env": {"PYTHONPATH": f"{tmp_path}:{ROOT}"}}
    run = subprocess.run([sys.executable, "-c", code], **where, capture_output=True, text=True)
    assert run.stdout.split() == [mlxmm.__version__, "9.9"], run.stderr


def test_the_version_is_read_when_it_is_asked_for():
    code = "import mlxmm, sys; print('configparser' in vars(sys.modules['mlxmm']), '__version__' in vars(mlxmm))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"], run.stderr


@pytest.mark.parametrize(
    ("shell", "shown"), [(types.SimpleNamespace(kernel=None), True), (object(), False), (None, False)]
)
def test_a_bar_moves_in_the_kernel_of_a_notebook_without_widgets_and_warnings(monkeypatch, recwarn, shell, shown):
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # not installed
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    bar = progress_bar("fit", 3, "step", iter("abc"))
    assert list(bar) == list("abc") and (type(bar) is tqdm) is shown and in_notebook() is shown
    assert ("fit: 100%" in err.getvalue()) is shown is ("fit: 3/3" not in err.getvalue()) and not list(recwarn)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("from mlxmm import LightningModule", "mlxmm has no LightningModule: write mlxmm.Module"),
        (
            "from mlxmm.callbacks import RichProgressBar",
            "mlxmm.callbacks has no RichProgressBar: write TQDMProgressBar",
        ),
        ("from mlxmm.loggers import CSVLogger", "mlxmm.loggers has no CSVLogger: write mlxmm.JSONLLogger"),
    ],
)
def test_an_import_of_lightnings_is_answered_too(line, told):
    with pytest.raises(ImportError, match=f"^{told}$"):
        exec(line)
    package = sys.modules[line.split()[1]]
    assert not hasattr(package, line.split()[-1])
