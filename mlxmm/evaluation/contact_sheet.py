"""A contact sheet: images, each with its reference and the generated caption."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

CELL, PICTURE, COLUMNS, MARGIN = (420, 110), 96, 2, 8
LETTERS, LINES = 48, 3  # of a caption that fit beside its image


def contact_sheet(rows: Sequence[dict], captions: Sequence[str]) -> Image.Image:
    """An RGB image with a cell for each row. Captions that equal a reference are green, others red."""
    height = -(-len(rows) // COLUMNS) * CELL[1]
    sheet = Image.new("RGB", (COLUMNS * CELL[0], height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (row, caption) in enumerate(zip(rows, captions)):
        left, top = i % COLUMNS * CELL[0] + MARGIN, i // COLUMNS * CELL[1] + MARGIN
        sheet.paste(row["image"].convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (left, top))
        colour = "darkgreen" if caption in row["captions"] else "firebrick"
        pen.text((left + PICTURE + MARGIN, top), _wrapped(row["captions"][0]), fill="black")
        pen.text((left + PICTURE + MARGIN, top + PICTURE // 2), _wrapped(caption), fill=colour)
    return sheet


def _wrapped(caption: str) -> str:
    return "\n".join(textwrap.wrap(caption, LETTERS, max_lines=LINES, placeholder=" …"))
