r"""Texts of others, such as file names and captions, where people look at them: nothing in them acts.

A caption may hold what moves a terminal's cursor, ends a line, begins a column of a table, or loads a picture.
"""

import re

# Control characters, ends of lines, what turns the direction of text round, and bytes that were no UTF-8.
ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MARKDOWN = {"\\": "\\\\", "|": "\\|", "[": "\\[", "`": "\\`", "<": "&lt;"}


def visible(text: object) -> str:
    r"""A text as one line in which no character acts: these are written as Python does, as `\x1b` or `\n`."""
    return ACTING.sub(lambda found: ascii(found[0])[1:-1], str(text))


def markdown(text: object) -> str:
    """A text as a line, or a cell of a table, of Markdown: no HTML, link, picture or column begins in it."""
    line = visible(" ".join(str(text).split()))
    return "".join(MARKDOWN.get(letter, letter) for letter in line)
