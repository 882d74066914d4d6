"""What a wheel holds, the command `mlxmm`, and one identity for each class however it was imported."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem.replace("_", "-") for path in (ROOT / "recipes").glob("[!_]*.py"))
SOURCES = {
    str(path.relative_to(ROOT) if folder == "mlxmm" else Path("mlxmm") / path.relative_to(ROOT))
    for folder in ("mlxmm", "callbacks", "recipes")
    for path in (ROOT / folder).rglob("*.py")
}


def python(*arguments, cwd: Path, path: Path) -> subprocess.CompletedProcess:
    """Python in folder `cwd`, with `path` where a package would be installed: behind the folder itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    environment["PYTHONPATH"] = str(path)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel. It is built in a copy, because setuptools leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("mlxmm", "callbacks", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *options, source], check=True)
    return next(folder.glob("mlxmm-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    folder = wheel.parent / "site-packages"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def user_folder(tmp_path) -> Path:
    """A folder with a `callbacks.py` and `recipes/` of the user's own, which cannot be imported."""
    for name in ("callbacks.py", "recipes/__init__.py", "recipes/align_qwen3.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('a file of the user was imported')")
    return tmp_path


def test_a_wheel_puts_only_mlxmm_into_site_packages_and_no_file_is_missing(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mlxmm"}
    assert {name for name in names if name.endswith(".py")} == SOURCES
    assert "mlxmm/py.typed" in names


def test_a_wheel_works_in_a_folder_with_callbacks_and_recipes_of_the_users_own(installed, user_folder):
    shown = python("-m", "mlxmm", "align-qwen3", "--help", cwd=user_folder, path=installed)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: mlxmm align-qwen3 [FLAGS]\n"), shown.stderr
    assert "python -m recipes" not in shown.stdout
    code = "from mlxmm.callbacks import EarlyStopping as M; import mlxmm; print(M.__module__, mlxmm.__file__)"
    imported = python("-c", code, cwd=user_folder, path=installed)
    assert imported.stdout.split() == ["mlxmm.callbacks.early_stopping", str(installed / "mlxmm/__init__.py")]


def test_a_checkout_works_from_a_folder_with_callbacks_and_recipes_of_the_users_own(user_folder):
    """An editable install is this: the checkout's `mlxmm` in the path, behind the folder itself."""
    shown = python("-m", "mlxmm", "align-qwen3", "--help", cwd=user_folder, path=ROOT)
    assert shown.stdout.startswith("usage: mlxmm align-qwen3 [FLAGS]\n"), shown.stderr


def test_the_wheel_declares_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "mlxmm = mlxmm.__main__:main" in archive.read(entry_points).decode()


def test_only_our_own_packages_are_modules_of_mlxmm():
    """mlxmm's search path is its own folder: a path beyond it would make `mlxmm.tests` of everything beside it."""
    code = "import mlxmm; print(list(mlxmm.__path__)); import mlxmm.tests"
    result = python("-c", code, cwd=ROOT, path=ROOT)
    assert result.stdout.strip() == str([str(ROOT / "mlxmm")])
    assert "No module named 'mlxmm.tests'" in result.stderr


IDENTITIES = {
    "class": "from callbacks import Timer as a; from mlxmm.callbacks import Timer as b",
    "class by its module": "from callbacks.timer import Timer as a; from mlxmm.callbacks import Timer as b",
    "module": "from callbacks import timer as a; from mlxmm.callbacks import timer as b",
    "module, long name first": "from mlxmm.callbacks import timer as b; from callbacks import timer as a",
    "recipes' part": "from recipes.parts.tower import build as a; from mlxmm.recipes.parts.tower import build as b",
    "recipes' package": "import recipes.parts as a; import mlxmm.recipes.parts as b",
    "recipe": "from recipes.caption import Config as a; from mlxmm.recipes.caption import Config as b",
}


@pytest.mark.parametrize("imports", IDENTITIES.values(), ids=IDENTITIES)
def test_a_class_has_one_identity_however_it_was_imported(imports):
    result = python("-c", f"{imports}; assert a is b, (a, b)", cwd=ROOT, path=ROOT)
    assert result.returncode == 0, result.stderr


def test_a_recipe_run_as_the_main_module_shares_its_parts(tmp_path):
    """Code that is run within the recipe's process, after it: what it imported is what everybody imports."""
    code = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('recipes.train_clip', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert sys.modules['recipes.parts.tower'] is sys.modules['mlxmm.recipes.parts.tower']\n"
    )
    result = python("-c", code, cwd=ROOT, path=ROOT)
    assert result.returncode == 0, result.stderr


def test_mlxmm_alone_lists_every_recipe_with_a_line_and_imports_none():
    alone = python("-X", "importtime", "-m", "mlxmm", cwd=ROOT, path=ROOT)
    assert alone.returncode == 0 and "mlxmm.recipes" not in alone.stderr
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in alone.stdout.splitlines() if line.startswith("  ")}
    assert sorted(lines) == RECIPES and all(about.endswith(".") for about in lines.values())
    assert python("-m", "mlxmm", "--help", cwd=ROOT, path=ROOT).stdout == alone.stdout


def test_an_unknown_recipe_is_one_line_with_the_known_ones_and_exit_2():
    result = python("-m", "mlxmm", "align-qwen", cwd=ROOT, path=ROOT)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: mlxmm align-qwen: did you mean align-qwen3?\n"
    result = python("-m", "mlxmm", "nothing-like-it", cwd=ROOT, path=ROOT)
    assert result.stderr == f"error: mlxmm nothing-like-it: choose one of {', '.join(RECIPES)}\n"


def test_a_recipe_says_how_it_was_called():
    by_command = python("-m", "mlxmm", "zero-shot", "--help", cwd=ROOT, path=ROOT).stdout
    by_module = python("-m", "recipes.zero_shot", "--help", cwd=ROOT, path=ROOT).stdout
    assert by_command.startswith("usage: mlxmm zero-shot [FLAGS]\n")
    assert by_module.startswith("usage: python -m recipes.zero_shot [FLAGS]\n")


def test_tools_find_what_they_import_of_the_project_from_any_folder_unless_they_are_started_as_modules(
    installed, tmp_path
):
    ours = []
    for tool in (ROOT / "tools").glob("*.py"):
        nodes = ast.walk(ast.parse(tool.read_text()))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        if {node.module.split(".")[0] for node in froms} & {"recipes", "tests", "tools"}:  # found from the root alone
            assert f"python {tool.relative_to(ROOT)}" not in tool.read_text(), tool
            continue
        ours += [node for node in froms if node.module.split(".")[0] in ("mlxmm", "callbacks")]
    done = python("-c", "\n".join(map(ast.unparse, ours)), cwd=tmp_path, path=installed)
    assert len(ours) > 20 and done.returncode == 0, done.stderr
