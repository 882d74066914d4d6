"""A contact sheet: images, each with a reference and what was said of it, those that went wrong first."""

import textwrap
from collections.abc import Iterable, Sequence

import attrs
from PIL import Image, ImageDraw

from mlxmm.escaping import visible
from mlxmm.evaluation.fonts import font_for

CELL, PICTURE, COLUMNS, MARGIN, TITLE, LETTER = (420, 124), 108, 2, 8, 40, 13  # pixels
NUM_LETTERS, NUM_LINES = 44, 3  # of a caption that fit beside its image
RIGHT, WRONG, FREE = "darkgreen", "firebrick", "navy"
LEGEND = "black: a reference; below it: what was said, with a tick where it equals a reference and a cross where not"


@attrs.frozen
class Section:
    """Images of one kind: `rows` with "image" and "captions", and what was said of each."""

    title: str
    rows: Sequence[dict]
    said: Sequence[str]

    @property
    def is_right(self) -> list[bool]:
        """Whether each caption equals a reference."""
        return [caption in row["captions"] for row, caption in zip(self.rows, self.said, strict=True)]


def failures_first(title: str, rows: Sequence[dict], said: Sequence[str], *, most: int) -> Section:
    """At most `most` of the rows: first those whose caption equals no reference, at most half, then others in order."""
    right = [caption in rows[i]["captions"] for i, caption in enumerate(said)]
    wrong = [i for i, is_right in enumerate(right) if not is_right][: most // 2]
    others = [i for i in range(len(said)) if i not in wrong][: most - len(wrong)]
    places = [*wrong, *others]
    share = f"{title}: {sum(right)} of {len(right)} equal a reference"
    return Section(share, [rows[i] for i in places], [said[i] for i in places])


def contact_sheet(sections: Iterable[Section], legend: str = LEGEND) -> Image.Image:
    """An RGB image: the legend, then the cells of each section under its title.

    Where no caption at all equals a reference, as with free texts, nothing is marked right or wrong.
    """
    sections = [section for section in sections if section.rows]
    marks = any(any(section.is_right) for section in sections)
    heights = [TITLE + -(-len(section.rows) // COLUMNS) * CELL[1] for section in sections]
    sheet = Image.new("RGB", (COLUMNS * CELL[0], TITLE + sum(heights)), "white")
    told = legend if marks else legend.partition(", with")[0]
    _write(ImageDraw.Draw(sheet), (MARGIN, MARGIN), told, "dimgray", lines=1)
    top = TITLE
    for section, height in zip(sections, heights):
        _draw_section(sheet, section, top, marks)
        top += height
    return sheet


def _draw_section(sheet: Image.Image, section: Section, top: int, marks: bool) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.line([(MARGIN, top), (sheet.width - MARGIN, top)], "lightgray")
    _write(pen, (MARGIN, top + MARGIN), section.title, "black", lines=1)
    for i, (row, said, is_right) in enumerate(zip(section.rows, section.said, section.is_right)):
        left = i % COLUMNS * CELL[0] + MARGIN
        above = top + TITLE + i // COLUMNS * CELL[1]
        sheet.paste(_thumbnail(row["image"]), (left, above))
        text = left + PICTURE + MARGIN
        _write(pen, (text, above), row["captions"][0], "black")
        colour = (RIGHT if is_right else WRONG) if marks else FREE
        _write(pen, (text + (2 * MARGIN if marks else 0), above + PICTURE // 2), said, colour)
        if marks:
            _mark(pen, (text, above + PICTURE // 2 + 2), is_right, colour)


def _thumbnail(image: Image.Image) -> Image.Image:
    """The image in its proportions, as large as fits. Small ones keep their pixels."""
    image = image.convert("RGB")
    scale = PICTURE / max(image.size)
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize(tuple(max(1, round(edge * scale)) for edge in image.size), how)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: str, lines: int = NUM_LINES) -> None:
    """A caption in at most `lines`; one line has the width of the sheet."""
    text = visible(" ".join(text.split()))
    if lines > 1:
        text = "\n".join(textwrap.wrap(text, NUM_LETTERS, max_lines=lines, placeholder=" …"))
    pen.text(place, text, fill=colour, font=font_for(text, LETTER))


def _mark(pen: ImageDraw.ImageDraw, place: tuple[int, int], is_right: bool, colour: str) -> None:
    """A tick or a cross, 8 pixels wide: colours alone do not tell everybody."""
    x, y = place
    if is_right:
        pen.line([(x, y + 6), (x + 3, y + 9), (x + 9, y + 1)], colour, 2)
    else:
        pen.line([(x, y + 1), (x + 8, y + 9)], colour, 2)
        pen.line([(x, y + 9), (x + 8, y + 1)], colour, 2)
