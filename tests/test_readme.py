"""The README and the pages of docs/ tell the truth: commands parse, flags, paths, names and links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import DistinctBatches, TinyRegression
from test_docs_code import code_of

import mlxmm
import mlxmm.callbacks
from mlxmm.cli import flags_of, parse_config, take_flag
from mlxmm.config import Preset, to_json
from mlxmm.storage.atomic import write_json

ROOT = Path(__file__).parents[1]
README, MAC = (ROOT / "README.md").read_text(), (ROOT / "docs/on-a-mac.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
ALL = "\n".join(PAGES.values())
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))
COMMON_FLAGS = {"preset", "help", "help-all"}  # of every recipe, beside its settings


def commands(text: str) -> list[tuple[str, str]]:
    """(recipe, arguments) of every command in indented blocks and between backticks, under either of its names."""
    blocks = re.findall(r"^    \S.*$|`[^`\n]+`", text.replace("\\\n", " "), re.MULTILINE)
    found = []
    for command in (block.strip(" `") for block in blocks):
        if match := re.search(r"(?:python -m recipes\.|^mlxmm )([\w-]+)(.*)", command):
            if "…" not in command and "--logger" not in command:  # flags of the reader; packages that may be missing
                found.append((match[1].replace("-", "_"), match[2]))
    return found


def presets(recipe: str) -> dict[str, Preset]:
    module = importlib.import_module(f"recipes.{recipe}")
    return getattr(module, "PRESETS", {"default": Preset("", module.Config())})


def parse(recipe: str, arguments: str):
    """The config that a command asks for. A run that it resumes is made first, in the working directory."""
    argv = shlex.split(arguments, comments=True)
    run_dir, _ = take_flag("--run-dir", argv)
    if run_dir is not None:
        Path(run_dir).mkdir(parents=True)
        write_json(Path(run_dir) / "config.json", to_json(presets(recipe)["default"].config))
    return parse_config(recipe, presets(recipe), argv)


@pytest.mark.parametrize(("recipe", "arguments"), sorted(set(commands(ALL))))
def test_a_command_of_a_page_is_one_that_its_recipe_takes(recipe, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(recipe, arguments)


def test_commands_under_both_names_are_found_and_every_recipe_but_the_inner_one_is_shown():
    text = "    python -m recipes.caption \\\n        --prompt x\n\n    mlxmm train-clip\n\nand `mlxmm zero-shot a.jpg`"
    assert commands(text) == [("caption", "          --prompt x"), ("train_clip", ""), ("zero_shot", " a.jpg")]
    assert {recipe for recipe, _ in commands(README)} == set(RECIPES) - {"train_language_model"}


def test_a_flag_of_a_page_is_a_flag_of_a_recipe_or_of_a_tool():
    known = COMMON_FLAGS | {
        name
        for recipe in RECIPES
        for flag in flags_of(presets(recipe)["default"].config)
        for name in (flag.name, (flag.field.metadata.get("flag") or "").removeprefix("--"))
    }
    tools = "".join(path.read_text() for path in (ROOT / "tools").rglob("*.py"))
    known |= set(re.findall(r'"--([\w-]+)"', tools)) | {"backend", "hosts"}  # mlx.launch has the last two
    known |= {"install", "logdir", "array", "wrap", "project", "samples_per_plugin"}  # of other programs
    named = set(re.findall(r"--([a-z][\w.-]+)", ALL))
    assert len(named) > 20 and named <= known, named - known


def test_what_a_page_names_is_there():
    paths = re.findall(r"`((?:mlxmm|callbacks|recipes|tools|tests|docs)/[\w/.-]*|\w+\.md)`", ALL)
    paths += re.findall(r"python (tools/\w+\.py)", ALL)
    modules = [name.replace(".", "/") for name in re.findall(r"python -m (tools(?:\.\w+)+)", ALL)]
    paths += [f"{name}/__main__.py" if (ROOT / name).is_dir() else f"{name}.py" for name in modules]
    written = {"recipes/train_colours.py"}  # by the reader of write-a-recipe.md
    exists = lambda path: path in written or (ROOT / path).exists() or (ROOT / f"{path}.py").exists()
    assert len(paths) > 30 and not [path for path in paths if not exists(path)]
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^    |`)make (\w+)", ALL, re.MULTILINE))
    assert targets >= {"demo", "test", "prove"} and not [name for name in targets if f"\n{name}:" not in makefile]


def test_the_page_for_macs_is_named_where_it_is_needed():
    assert "`docs/on-a-mac.md`" in README and "docs/on-a-mac.md" in (ROOT / "recipes/align_qwen3.py").read_text()
    assert len(commands(MAC)) >= 6 and len(MAC.splitlines()) < 140


def test_the_readme_names_every_callback_and_no_other():
    listed = re.search(r"`callbacks/` has (.*?)\n`make", README, re.DOTALL)[1]
    errors = {name for name in mlxmm.callbacks.__all__ if name.endswith("Error")}
    assert set(re.findall(r"`(\w+)`", listed)) == set(mlxmm.callbacks.__all__) - errors


def test_the_callback_of_the_readme_runs_and_stops_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code_of(README), names)  # the very text
    trainer = names["Trainer"](
        max_steps=9,
        callbacks=[names["StopWhenGood"](threshold=1e9)],
        enable_model_summary=False,
        val_check_interval=3,
    )
    data = DistinctBatches()
    trainer.fit(TinyRegression(), train_dataloaders=data, val_dataloaders=data)
    assert trainer.global_step == 3


def test_a_link_of_a_page_leads_somewhere():
    links = [(name, target) for name, text in PAGES.items() for target in re.findall(r"\]\(([^)#\s]+)", text)]
    inside = [(name, target) for name, target in links if not target.startswith("http")]
    folder = lambda name: ROOT if name == "README.md" else ROOT / "docs"
    assert len(inside) > 20 and not [pair for pair in inside if not (folder(pair[0]) / pair[1]).exists()]


def test_every_page_is_in_the_menu_of_the_site_and_no_other():
    menu = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(set(PAGES) - {"README.md"})
