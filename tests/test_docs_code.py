"""The Python on the pages of docs/ and in the README runs as it stands there."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"] if "```python" in page.read_text()
]


def code_of(page: str, language: str = "python") -> str:
    """The blocks of a page as one module. Other lines are left empty, so that line numbers are those of the page."""
    lines, inside = [], False
    for line in page.splitlines():
        if line.startswith("```"):
            inside = not inside and line == f"```{language}"
        lines.append("" if not inside or line.startswith("```") else line)
    return "\n".join(lines)


def imported_names(code: str):
    """(module, name) of every `from module import name`; syntax errors are raised."""
    froms = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.name) for node in froms for alias in node.names]


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Import `code` as a module `page`, in a process of its own that stands in `folder`."""
    (folder / "page.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLXMM_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", "import page"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_four_pages_are_there():
    assert {f"write-a-{thing}.md" for thing in ("callback", "module", "source", "recipe")} <= {p.name for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_python_of_a_page_runs(page, tmp_path):
    code = code_of(page.read_text())
    assert code.strip(), f"{page.name} has no block of Python"
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_python_that_needs_weights_imports_what_exists(page):
    """Such blocks are marked `py`, not `python`: they start from a trained run or the Hub, which nobody has here."""
    names = imported_names(code_of((ROOT / page).read_text(), "py"))
    assert names and not [pair for pair in names if not hasattr(importlib.import_module(pair[0]), pair[1])]


def test_every_block_of_the_pages_has_a_language_that_says_what_it_is():
    """A block in another spelling of Python would be skipped without a word. That of serve.md, which asks a server, is
    run by tests/serving; that of export.md starts from a trained run."""
    for page in (ROOT / "docs").glob("*.md"):
        known = {"python", "mermaid"} | ({"py"} if page.name in ("serve.md", "export.md") else set())
        assert set(re.findall(r"^```(\w+)", page.read_text(), re.MULTILINE)) <= known, page
    assert set(re.findall(r"^```(\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)) == {"python", "py"}


def test_an_error_on_a_page_is_found(tmp_path):
    """An error in any block fails, at its line of the page."""
    page = "# A page\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n"
    result = run(code_of(page), tmp_path)
    assert result.returncode == 1 and 'page.py", line 10' in result.stderr
    assert code_of("no code\n```py\nx\n```\n").strip() == ""
