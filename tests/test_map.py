"""The map of the repository: imports flow one way, and what the README names is there."""

import ast
import re
from pathlib import Path

import pytest

from mlxmm.callback import HOOKS

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "mlxmm": ("callbacks", "recipes", "tools"),
    "callbacks": ("recipes", "tools"),
    "recipes": ("tools",),
    "mlxmm/networks": ("mlxmm.data", "mlxmm.modules", "mlxmm.trainer"),
    "mlxmm/data": ("mlxmm.networks", "mlxmm.modules", "mlxmm.trainer"),
    "mlxmm/modules": ("mlxmm.trainer",),
    "mlxmm/trainer.py": ("mlxmm.modules", "mlxmm.networks", "mlxmm.data"),
}
DOORS = {  # each outside package is imported by one file, or by one folder
    "grain": "mlxmm/data/loader.py",
    "datasets": "mlxmm/data/tables.py",
    "tyro": "mlxmm/config.py",
    "sacrebleu": "mlxmm/metrics.py",
    "tensorboardX": "mlxmm/loggers.py",
    "huggingface_hub": "mlxmm/hub.py",
    "mlx_lm": "mlxmm/networks/language_model.py",
    "transformers": "mlxmm/data/tokenizers.py",
    "sklearn": "mlxmm/linear_probe.py",
    "tqdm": "callbacks/tqdm_progress_bar.py",
}
SOURCES = [p for part in ("mlxmm", "callbacks", "recipes") for p in (ROOT / part).rglob("*.py")]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_flow_down_only(part):
    for path in [ROOT / part] if part.endswith(".py") else (ROOT / part).rglob("*.py"):
        for name in imports(path):
            assert not any(name == f or name.startswith(f + ".") for f in FORBIDDEN[part]), f"{path}: {name}"


@pytest.mark.parametrize("package", DOORS)
def test_each_outside_package_has_one_door(package):
    users = {str(p.relative_to(ROOT)) for p in SOURCES if package in {n.split(".")[0] for n in imports(p)}}
    assert users == {DOORS[package]}


def test_what_the_readme_names_is_there():
    readme = (ROOT / "README.md").read_text()
    paths = re.findall(r"`((?:mlxmm|callbacks|recipes|tools|tests)/[\w/.]*)`", readme)
    assert len(paths) > 8 and not [path for path in paths if not (ROOT / path).exists()]
    targets = re.findall(r"make (\w+)", readme)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets if target not in ("MLX",)), targets


def test_the_page_of_hooks_names_all_39_of_lightnings_and_every_one_of_ours():
    rows = re.findall(r"^\| (`?\w+.*?) \| (.*?) \|", (ROOT / "docs/hooks.md").read_text(), re.MULTILINE)[1:]
    theirs = [left.strip("`").split("(")[0] for left, _ in rows if left.startswith("`")]
    ours = {theirs if right == "same" else right.strip("`").split("(")[0] for theirs, (_, right) in zip(theirs, rows)}
    assert len(theirs) == len(set(theirs)) == 39
    assert set(HOOKS) - {"on_save_point"} <= ours | set(theirs) and {"state_dict", "load_state_dict"} <= ours


def test_the_callback_of_the_readme_runs_and_stops_a_run():
    from conftest import DistinctBatches, TinyRegression

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(code, names)  # the very text
    trainer = names["Trainer"](
        max_steps=9,
        callbacks=[names["StopWhenGood"](threshold=1e9)],
        enable_model_summary=False,
        val_check_interval=3,
    )
    data = DistinctBatches()
    trainer.fit(TinyRegression(), train_dataloaders=data, val_dataloaders=data)
    assert trainer.global_step == 3
