"""A font that has the letters of a text: the first of this machine's that does, else Pillow's own."""

import functools
import importlib.util
from pathlib import Path

from PIL import ImageFont

from mlxmm.errors import warn

# By what they have: Latin, Greek and Cyrillic first, then Chinese, Japanese and Korean, then nearly everything.
NAMES = (
    "DejaVuSans.ttf",
    "Arial.ttf",
    "Helvetica.ttc",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Hiragino Sans GB.ttc",
    "PingFang.ttc",
    "NotoSansCJKsc-Regular.otf",
    "AppleSDGothicNeo.ttc",
    "Arial Unicode.ttf",
    "unifont.ttf",
    "NotoEmoji-Regular.ttf",
)


@functools.lru_cache(maxsize=4_096)
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The first font with all letters of `text`, at `size` pixels; of several that lack some, the one with most.

    Warns once of letters that no font has.
    """
    letters = {letter for letter in text if not letter.isspace()}
    best = min(_fonts(size), key=lambda font: sum(_lacks(font, letter) for letter in letters))
    if any(_lacks(best, letter) for letter in letters):
        _warn()
    return best


@functools.cache
def _warn() -> None:
    warn("no font here has all letters of the captions, some show as boxes: pip install mplfonts")


@functools.cache
def _fonts(size: int) -> list:
    return [ImageFont.load_default(size), *filter(None, (_found(name, size) for name in NAMES))]


def _found(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    for place in (name, *_shipped(name)):  # Pillow looks for a name in the folders of the system
        try:
            return ImageFont.truetype(place, size)
        except OSError:
            continue
    return None


def _shipped(name: str) -> list[str]:
    """The font in the packages that bring fonts, where they are installed: mplfonts comes with `mlxmm[fonts]`."""
    found = []
    for package, folder in (("matplotlib", "mpl-data/fonts/ttf"), ("mplfonts", "fonts")):
        spec = importlib.util.find_spec(package)
        found += [Path(spec.origin).parent / folder / name] if spec and spec.origin else []
    return [str(path) for path in found if path.exists()]


@functools.lru_cache(maxsize=65_536)
def _lacks(font, letter: str) -> bool:
    """Whether the font draws the letter as it draws one that no font has."""
    return _drawn(font, letter) == _drawn(font, "\U000ffffd")


def _drawn(font, letter: str) -> tuple:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
