"""The captions in a row of a table: in one column or several, in lists, in structs.

caption    caption_0 caption_1    caption_*    sentences.raw
"""

import ast
import contextlib
import fnmatch
import io
import tokenize
import unicodedata
from collections.abc import Mapping, Sequence

from mlxmm.storage import json_values

READER = 1  # counts the changes of what is read as a caption: findings about captions depend on it
TEXTS = ("text", "raw", "caption")  # of a struct that stands for a caption, the field that holds it


def matching(wanted: str, names: Sequence[str]) -> list[str]:
    """The columns that `wanted` names: one, several with blanks between them, patterns, or paths into structs."""
    found = [wanted] if wanted in names else []
    for one in wanted.split() if not found else ():
        whole = one if one in names else one.partition(".")[0]
        found += [one] if whole in names else sorted(fnmatch.filter(names, one), key=_number)
    return found


def _number(name: str) -> tuple[str, int]:
    """caption_2 stands before caption_10."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)


def value_at(row: Mapping, name: str):
    """The value in a column, or at a path into structs and lists of structs: all of a list's. None if there is none."""
    value = row.get(name)
    if value is None and "." in name:
        first, _, rest = name.partition(".")
        inner = row.get(first)
        if isinstance(inner, list):
            return [value_at(one, rest) for one in inner if isinstance(one, Mapping)]
        return value_at(inner, rest) if isinstance(inner, Mapping) else None
    return value


def cells_at(row: Mapping, wanted: str) -> list:
    """What the columns `wanted` hold: one cell after the other, those of lists too."""
    values = (value_at(row, name) for name in matching(wanted, list(row)))
    return [cell for value in values for cell in (value if isinstance(value, list) else [value])]


def captions_at(row: Mapping, wanted: str) -> list[str]:
    """The captions of a row in the columns `wanted`, those without letters left out."""
    return texts_in(cells_at(row, wanted))


def texts_in(value) -> list[str]:
    """The texts in a cell: a string, which may be a written-out list, a struct with a text, or a list of these."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in TEXTS if value.get(name)), None)
    if isinstance(value, list | tuple):
        return [text for one in value for text in texts_in(one)]
    if not isinstance(value, str):
        return []
    written = _list_in(value)
    return [text for one in written for text in texts_in(one)] if written else [value.strip()] * _says_something(value)


def _says_something(text: str) -> bool:
    """Whether a letter can be seen: blanks, joiners and control characters cannot."""
    return any(unicodedata.category(letter)[0] not in "CZ" for letter in text)


def _list_in(text: str) -> list[str]:
    """The captions of a list that is written in a text, as JSON or as pandas writes Python's lists and NumPy's arrays,
    which have no commas; none in another text."""
    if not text.lstrip().startswith(('["', "['")):
        return []
    with contextlib.suppress(ValueError):
        values = json_values.loads(text)
        return values if all(isinstance(one, str) for one in values) else []
    with contextlib.suppress(tokenize.TokenError, SyntaxError, ValueError):
        tokens = [one for one in tokenize.generate_tokens(io.StringIO(text.strip()).readline) if one.string.strip()]
        values = [ast.literal_eval(one.string) for one in tokens if one.type == tokenize.STRING]
        between = {one.string for one in tokens if one.type != tokenize.STRING}
        return values if between <= set("[,]") and all(isinstance(one, str) for one in values) else []
    return []
