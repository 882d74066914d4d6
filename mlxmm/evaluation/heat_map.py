"""A heat map: a square matrix as a picture, whose rows and columns stand for the same things in the same order."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from mlxmm.evaluation.fonts import font_for

MARGIN, LETTER = 8, 12  # pixels
LARGE, SMALL, SIDE = 36, 14, 720  # of a cell at most and at least, and of the map, unless its cells are at least small
NUM_LETTERS = 52  # of a label
SHADES = np.array([(247, 251, 255), (107, 174, 214), (8, 48, 107)])  # of the lowest value, the middle, the highest


def heat_map(
    values: np.ndarray, labels: Sequence[str], title: str, form: str, pictures: Sequence[Image.Image] | None = None
) -> Image.Image:
    """An RGB picture of `values` (N, N): dark is high, and the highest value of each row has a frame.

    Columns have numbers, which the labels at the right explain; `pictures` stand at the left. Values are written into
    cells that are large enough, as `form` says: "{:.2f}".
    """
    side = min(LARGE, max(SMALL, SIDE // len(values)))
    left, top = MARGIN + (side + MARGIN if pictures else 0), 3 * MARGIN + 2 * LETTER
    labels = [_label(i, label) for i, label in enumerate(labels)]
    width = left + len(values) * side + 2 * MARGIN + max(map(_width, labels))
    height = top + len(values) * side + MARGIN
    canvas = Image.new("RGB", (max(width, _width(title) + 2 * MARGIN), height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), title, "dimgray", font_for(title, LETTER))
    for i, row in enumerate(_colours(values)):
        _draw_row(pen, (left, top + i * side), side, row, values[i], form)
        place = left + len(values) * side + MARGIN, top + (i + 0.5) * side - 1
        pen.text(place, labels[i], "black", font_for(labels[i], LETTER), "lm")
        if side >= 20 or i % 5 == 4:
            pen.text((left + (i + 0.5) * side, top - 2), str(i + 1), "black", font_for("0", LETTER), "ms")
    for i, picture in enumerate(pictures or ()):
        canvas.paste(
            ImageOps.pad(picture.convert("RGB"), (side - 2, side - 2), color="white"), (MARGIN, top + i * side)
        )
    return canvas


def _colours(values: np.ndarray) -> np.ndarray:
    """(N, N) values to (N, N, 3) colours. What is no number is as low as the lowest."""
    finite = np.nan_to_num(values, nan=np.nanmin(values) if np.isfinite(values).any() else 0.0)
    share = (finite - finite.min()) / max(finite.max() - finite.min(), 1e-9)
    return np.stack([np.interp(share, (0, 0.5, 1), channel) for channel in SHADES.T], axis=-1).astype(int)


def _draw_row(pen, place: tuple[int, int], side: int, colours: np.ndarray, values: np.ndarray, form: str) -> None:
    x, y = place
    for j, colour in enumerate(colours):
        pen.rectangle((x + j * side, y, x + (j + 1) * side - 2, y + side - 2), tuple(colour))
        if side >= 30:
            ink = "white" if colour.sum() < 450 else "black"
            pen.text((x + (j + 0.5) * side - 1, y + side / 2 - 1), form.format(values[j]), ink, font_for("0", 11), "mm")
    if values.max() > values.min():
        best = int(values.argmax())
        pen.rectangle((x + best * side, y, x + (best + 1) * side - 2, y + side - 2), outline="black", width=2)


def _label(place: int, label: str) -> str:
    return f"{place + 1}  {label if len(label) <= NUM_LETTERS else label[: NUM_LETTERS - 2] + ' …'}"


def _width(text: str) -> int:
    return math.ceil(font_for(text, LETTER).getlength(text))
