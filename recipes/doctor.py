"""Report what mlxmm finds on this machine, and what to do about what is missing.

    python -m recipes.doctor

Exits with 1 if something is broken that training needs. Put the report into an issue when you report one: it never
shows a token.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from attrs.validators import gt

from mlxmm import diagnostics
from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, option
from mlxmm.diagnostics import Row
from mlxmm.errors import UserError
from mlxmm.modules.qwen3_aligner import Qwen3Aligner

from .parts.alignment import FLICKR30K_PRESETS, FLICKR30K_ROWS, AlignmentConfig, plan_alignment


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config:
    """Whether the Hub is asked, and for how long."""

    offline: bool = option(False, "do not ask the Hub whether it answers", first=True)
    timeout: float = option(5.0, "seconds to wait for the Hub", gt(0), first=True)


def main(config: Config) -> None:
    sections = find(config)
    print(report(sections))
    if any(row.broken for rows in sections.values() for row in rows):
        raise SystemExit(1)


def find(config: Config) -> dict[str, list[Row]]:
    """The rows of every section, by its title. What else is to be reported is one more function that returns rows."""
    hub_rows = diagnostics.hub_access(offline=config.offline, timeout=config.timeout)
    return {
        "Versions": diagnostics.versions(),
        "Device": diagnostics.device(),
        "Computing": diagnostics.computing(),
        "Hub": hub_rows,
        "Disk": diagnostics.disk(),
        "Presets of align_qwen3": presets(offline=Row("answers", "yes") not in hub_rows),
    }


def presets(*, offline: bool) -> list[Row]:
    """What each preset needs, and whether this machine has it: from settings on the Hub, without weights. `offline`
    takes them from the cache."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each small file
            return [Row(name, _need(preset.config, offline)) for name, preset in FLICKR30K_PRESETS.items()]
    except (UserError, ImportError) as error:  # a package that is missing has a row of its own
        return [Row("what they need", f"not known: {error}")]


def _need(config: AlignmentConfig, offline: bool) -> str:
    plan = plan_alignment(config, Qwen3Aligner.unloaded(config.module, offline=offline), FLICKR30K_ROWS)
    return f"{plan}: {'; '.join(plan.shortages(Path.cwd())) or 'this machine has both'}"


def report(sections: Mapping[str, Sequence[Row]]) -> str:
    """All sections, then what to do, with what is broken first."""
    rows = [row for section in sections.values() for row in section]
    width = max(len(row.name) for row in rows) + 2
    parts = [block(title, [f"{row.name:<{width}}{row.value}" for row in found]) for title, found in sections.items()]
    parts.append(block("To do, or training fails", [row.advice for row in rows if row.advice and row.broken]))
    parts.append(block("To do, if you need it", [row.advice for row in rows if row.advice and not row.broken]))
    return "\n\n".join(filter(None, parts))


def block(title: str, lines: Sequence[str]) -> str:
    """A title with its lines below it; empty without lines."""
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) if lines else ""


if __name__ == "__main__":
    run_recipe("doctor", main, {"default": Preset("", Config())})
