"""The architecture: rooms in layers, imports that flow down, one door for each outside package."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mlxmm.training.callback import HOOKS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
# From top to bottom. A file imports from rooms of lower layers, and from its own room.
LAYERS = [
    ("tools/bench",),
    ("tools",),
    ("recipes", "mlxmm/__main__"),
    ("recipes/parts",),
    ("callbacks", "mlxmm/captioners", "mlxmm/serving"),
    ("mlxmm", "mlxmm/loggers"),  # the public names
    ("mlxmm/evaluation",),
    ("mlxmm/modules",),
    ("mlxmm/export",),
    ("mlxmm/data", "mlxmm/data/sources"),
    (
        "mlxmm/training",
        "mlxmm/networks",
        "mlxmm/preprocessing",
        "mlxmm/cli",
        "mlxmm/losses",
        "mlxmm/optimizers",
        "mlxmm/diagnostics",
    ),
    ("mlxmm/storage",),
    ("mlxmm/distributed",),
    ("mlxmm/compute", "mlxmm/progress_bar"),
    ("mlxmm/config", "mlxmm/environment", "mlxmm/backends"),
    ("mlxmm/errors", "mlxmm/checkout", "mlxmm/commands", "mlxmm/version"),
    ("mlxmm/terminal",),
    ("mlxmm/escaping",),
]
LAYER_OF = {room: -place for place, rooms in enumerate(LAYERS) for room in rooms}
WITHIN = {("mlxmm/data", "mlxmm/data/sources")}  # rooms of one layer of which the first may import the second
DOORS = {  # each outside package is imported by one file, or by one folder
    "grain": "mlxmm/data/loader.py",
    "datasets": "mlxmm/data/sources/tables.py",
    "tyro": "mlxmm/cli.py",
    "sacrebleu": "mlxmm/evaluation/caption_metrics.py",
    "tensorboardX": "mlxmm/training/tensorboard_logger.py",
    "wandb": "mlxmm/training/trackers.py",
    "trackio": "mlxmm/training/trackers.py",
    "huggingface_hub": "mlxmm/storage/hub.py",
    "xxhash": "mlxmm/storage/frozen_weights.py",
    "mlx_vlm": "mlxmm/captioners/mlx_vlm_child.py",
    "openai": "mlxmm/captioners/chat_server.py",
    "starlette": "mlxmm/serving/app.py",
    "uvicorn": "mlxmm/serving/app.py",
    "mlx_lm": "mlxmm/networks/language_model.py",
    "transformers": "mlxmm/preprocessing/tokenizers.py",
    "sklearn": "mlxmm/evaluation/linear_probe.py",
    "tqdm": "mlxmm/progress_bar.py",
    "py3langid": "mlxmm/captioners/text_filters.py",
    "rapidfuzz": "mlxmm/captioners/duplicates.py",
    "imagehash": "mlxmm/captioners/duplicates.py",
}
SOURCES = {p.relative_to(ROOT): p for d in ("mlxmm", "callbacks", "recipes", "tools") for p in (ROOT / d).rglob("*.py")}
del SOURCES[Path("mlxmm/export/mlx_vlm_llava.py")]  # copied into exported folders, for mlx-vlm: nothing here imports it


def room(path: Path) -> str:
    """The folder of a file; of a file right in mlxmm/, the file itself."""
    if str(path.parent) == "mlxmm" and path.name != "__init__.py":
        return f"mlxmm/{path.stem}"
    return str(path.parent)


def imports(path: Path, source: str) -> set[tuple[str, str]]:
    """(module, name) pairs of all imports of a file, wherever they stand; relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            found |= {(module, alias.name) for alias in node.names}
    return found


def resolve(module: str, name: str) -> Path | None:
    """Our own file that an import names; None for an outside package."""
    module = re.sub(r"^mlxmm\.(callbacks|recipes)\b", r"\1", module)
    base = Path(*module.split("."))
    candidates = [base / name / "__init__.py", base / f"{name}.py"] if name else []
    candidates += [base / "__init__.py", base.with_suffix(".py")]
    return next((path for path in candidates if path in SOURCES), None)


def own_imports(path: Path, source: str) -> set[Path]:
    return {target for pair in imports(path, source) if (target := resolve(*pair)) and target != path}


def wrong_way(path: Path, source: str) -> list[str]:
    """The imports of a file that do not go down."""
    here = room(path)
    return [
        f"{path} imports {target}"
        for target in own_imports(path, source)
        if (there := room(target)) != here and (here, there) not in WITHIN and not LAYER_OF[there] < LAYER_OF[here]
    ]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_flow_down_only(path):
    assert wrong_way(path, SOURCES[path].read_text()) == []


def test_an_import_that_climbs_is_found():
    storage = Path("mlxmm/storage/runs.py")
    assert wrong_way(storage, "from mlxmm.training import trainer") == [f"{storage} imports mlxmm/training/trainer.py"]
    assert wrong_way(Path("mlxmm/networks/clip.py"), "def f():\n    from mlxmm.training.module import Module")


def test_no_file_imports_itself_by_way_of_others():
    graph = {path: own_imports(path, source.read_text()) for path, source in SOURCES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_recipe_imports_another():
    for path in SOURCES:
        if path.parent == Path("recipes"):
            assert not [p for p in own_imports(path, SOURCES[path].read_text()) if p.parent == Path("recipes")], path


def test_no_private_name_crosses_a_room():
    for path, source in SOURCES.items():
        for module, name in imports(path, source.read_text()):
            target = resolve(module, name)
            private = name.startswith("_") and not name.startswith("__")
            assert target is None or not private or room(target) == room(path), f"{path}: {module}.{name}"


@pytest.mark.parametrize("package", DOORS)
def test_each_outside_package_has_one_door(package):
    users = {
        str(path)
        for path, source in SOURCES.items()
        if path.parts[0] != "tools"
        and package in {module.split(".")[0] for module, _ in imports(path, source.read_text())}
    }
    assert users == {DOORS[package]}


def test_the_page_of_hooks_names_all_39_of_lightnings_and_every_one_of_ours():
    rows = re.findall(r"^\| (`?\w+.*?) \| (.*?) \|", (ROOT / "docs/hooks.md").read_text(), re.MULTILINE)[1:]
    theirs = [left.strip("`").split("(")[0] for left, _ in rows if left.startswith("`")]
    ours = {theirs if right == "same" else right.strip("`").split("(")[0] for theirs, (_, right) in zip(theirs, rows)}
    assert len(theirs) == len(set(theirs)) == 39
    assert set(HOOKS) - {"on_save_point"} <= ours | set(theirs) and {"state_dict", "load_state_dict"} <= ours


def test_every_room_has_a_layer():
    assert {room(path) for path in SOURCES} == set(LAYER_OF)


def test_the_page_on_the_architecture_has_the_layers():
    table = re.search(r"## Layers\n(.*?)\n## ", PAGE, re.DOTALL)[1]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert [tuple(re.findall(r"`(.*?)`", row)) for row in rows] == LAYERS


def test_what_the_page_on_the_architecture_names_is_there():
    names = re.findall(r"`((?:mlxmm|callbacks|recipes|tools|tests|docs)/[\w./-]*)`", PAGE)
    missing = [name for name in names if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()]
    assert len(names) > 60 and missing == []
    for name in ("open_source", "CaptionData", "TrainStep", "open_run", "parse_config", "dump_checkpoint"):
        definition = rf"^ *(def|class) {name}\b"
        assert name in PAGE and any(re.search(definition, p.read_text(), re.MULTILINE) for p in SOURCES.values()), name
