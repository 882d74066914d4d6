"""A report of claims, each with a verdict: Markdown to paste into an issue."""

from collections.abc import Sequence

import attrs

from mlxmm.diagnostics import Row

HOLDS, FAILS, NOT_TRIED = "holds", "does not hold", "not tried"


@attrs.frozen
class Line:
    """A claim, its verdict, and what was measured, or why it was not tried."""

    claim: str
    verdict: str
    detail: str


def judged(claim: str, holds: bool, detail: str) -> Line:
    return Line(claim, HOLDS if holds else FAILS, detail)


def not_tried(claim: str, why: str) -> Line:
    return Line(claim, NOT_TRIED, why)


def markdown(machine: Sequence[Row], lines: Sequence[Line]) -> str:
    """What was found on the machine, the claims, and how many hold."""
    found = [(row.name, row.value) for row in machine]
    claims = [(line.claim, f"**{line.verdict}**", line.detail) for line in lines]
    counts = [f"{sum(line.verdict == each for line in lines)} {each}" for each in (HOLDS, FAILS, NOT_TRIED)]
    parts = _table(("machine", "found"), found), _table(("claim", "verdict", "measured"), claims), ", ".join(counts)
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in row)} |" for row in cells)
