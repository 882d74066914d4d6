"""Conditions on columns: which rows of a source are read, and which captions of a row.

    clip_score>=0.6    captioner==Qwen/Qwen2.5-VL-3B-Instruct    label!=cat

A column holds one value for a row, or a list of one for each of its captions. A missing value meets no condition.
"""

import operator
import re
from collections.abc import Sequence
from typing import Any

import attrs

from mlxmm.errors import UserError

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
PATTERN = re.compile(rf"\s*([^<>=!]+?)\s*({'|'.join(OPERATORS)})\s*([^=].*?)\s*")
NUMBERS = ("int", "uint", "float", "double")


@attrs.frozen
class Condition:
    """A column compared with a value: text as it was written, until `typed` makes it what the column holds."""

    column: str
    operator: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Of "clip_score>=0.6". Raises `UserError`."""
        if (found := PATTERN.fullmatch(text)) is None:
            raise UserError(f"--data.where {text!r}: write it as clip_score>=0.6, with one of {' '.join(OPERATORS)}")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.column}{self.operator}{self.value}"

    def typed(self, kind) -> "Condition":
        """The condition on a column of this feature of `datasets`. Raises `UserError` where they do not fit."""
        one = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
        dtype = getattr(one, "dtype", None) or type(one).__name__
        try:
            if hasattr(one, "str2int"):  # classes, which are named
                return attrs.evolve(self, value=one.str2int(self.value))
            if dtype.startswith(NUMBERS):
                return attrs.evolve(self, value=float(self.value))
            if dtype == "bool":
                return attrs.evolve(self, value={"true": True, "false": False}[self.value.lower()])
        except (ValueError, KeyError):
            raise UserError(
                f"--data.where {self}: column {self.column!r} holds {dtype}, and not {self.value}"
            ) from None
        if dtype not in ("string", "large_string"):
            raise UserError(f"--data.where {self}: column {self.column!r} holds {dtype}, which has no such condition")
        return self

    def met(self, value, num_captions: int) -> list[bool]:
        """For each caption of a row, whether it is met where the column holds `value`."""
        if not isinstance(value, list):
            return [self._holds(value)] * max(1, num_captions)
        if len(value) != num_captions:
            raise UserError(f"--data.where {self}: a row has {num_captions} captions and {len(value)} {self.column}")
        return [self._holds(one) for one in value]

    def _holds(self, value) -> bool:
        return value is not None and OPERATORS[self.operator](value, self.value)


def all_met(conditions: Sequence[Condition], values: dict, cell) -> list[bool]:
    """For each caption in `cell` (one, or a list), whether all conditions are met by the row's `values`.

    A row without captions has one answer, or none.
    """
    num_captions = len(cell) if isinstance(cell, list) else 1
    met = [condition.met(values[condition.column], num_captions) for condition in conditions]
    return [all(each) for each in zip(*met)] if met else [True] * num_captions
