"""The command `mlxmm`: lists the recipes, or runs one: `mlxmm align-qwen3 --help`."""

import ast
import difflib
import runpy
import sys
from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    """Run the recipe that the first argument names; without one, list them all. An unknown name exits with 2."""
    name, *flags = sys.argv[1:] or ["--help"]
    name = name.replace("_", "-")
    recipes = {path.stem.replace("_", "-"): path for path in sorted(RECIPES.glob("[!_]*.py"))}
    if name in ("-h", "--help"):
        print(usage(recipes))
    elif name in recipes:
        sys.argv[1:] = flags
        runpy.run_module(f"mlxmm.recipes.{recipes[name].stem}", run_name="__main__", alter_sys=True)
    else:
        meant = difflib.get_close_matches(name, recipes, 1)
        advice = f"did you mean {meant[0]}?" if meant else f"choose one of {', '.join(recipes)}"
        print(f"error: mlxmm {name}: {advice}", file=sys.stderr)
        raise SystemExit(2)


def usage(recipes: dict[str, Path]) -> str:
    """One line for each recipe: its name and the first line of its docstring."""
    lines = "\n".join(f"  {name:<20} {first_line(path)}" for name, path in recipes.items())
    return f"usage: mlxmm RECIPE [FLAGS]\n\nrecipes:\n{lines}\n\nmlxmm RECIPE --help lists its flags."


def first_line(path: Path) -> str:
    """The first line of a file's docstring. The file is parsed, not imported: recipes import whole models."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
