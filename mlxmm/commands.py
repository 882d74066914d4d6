"""Commands that a reader can copy as they stand: with the interpreter that runs, by the shortest name it has here."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def program(recipe: str) -> str:
    """How the recipe is called: by the command `mlxmm`, or by `python -m` in a checkout."""
    return f"mlxmm {recipe.replace('_', '-')}" if _is_installed() else f"python -m recipes.{recipe}"


def command(recipe: str, *arguments: str | Path) -> str:
    """The command that runs a recipe with these arguments, from the folder that the reader is in."""
    first, *rest = program(recipe).split()
    return shlex.join([tool(first) or first, *rest, *map(str, arguments)])


def tool(name: str) -> str | None:
    """How a program beside this interpreter is called: by its name if the shell finds that one, else by its path,
    relative where it is below this folder. None if it is not there."""
    beside = Path(sys.executable).with_name(name)
    if name == "python":
        beside = Path(sys.executable)
    if not beside.exists():
        return None
    if (found := shutil.which(name)) is not None and os.path.realpath(Path(found).parent) == os.path.realpath(
        beside.parent
    ):
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def is_recipe() -> bool:
    """Whether this process is that of a recipe: run by `python -m`, also while Python still imports it, or by the
    command `mlxmm`, which takes a recipe for the main module and changes `sys.argv`."""
    called = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    names = [*called[:1], Path(sys.argv[0]).name, getattr(spec, "name", "")]
    return any(name == "mlxmm" or name.startswith(("recipes.", "mlxmm.recipes.")) for name in names)


def _is_installed() -> bool:
    """Whether the command `mlxmm` runs, not `python -m recipes.…`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("mlxmm.")
