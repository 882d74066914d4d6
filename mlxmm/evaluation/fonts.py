"""A font that has the letters of a text: the first of this machine's that does, else Pillow's own."""

import functools
from pathlib import Path

from PIL import ImageFont

# By what they have: Latin, Greek and Cyrillic first, then Chinese, Japanese and Korean, then nearly everything.
NAMES = (
    "DejaVuSans.ttf",
    "Arial.ttf",
    "Helvetica.ttc",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Hiragino Sans GB.ttc",
    "PingFang.ttc",
    "AppleSDGothicNeo.ttc",
    "Arial Unicode.ttf",
    "unifont.ttf",
    "NotoEmoji-Regular.ttf",
)


@functools.lru_cache(maxsize=4_096)
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The first font with all letters of `text`, at `size` pixels; of several that lack some, the one with most."""
    letters = {letter for letter in text if not letter.isspace()}
    return min(_fonts(size), key=lambda font: sum(_lacks(font, letter) for letter in letters))


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
    """Fonts that matplotlib brings, where it is installed."""
    import importlib.util

    spec = importlib.util.find_spec("matplotlib")
    folder = Path(spec.origin).parent / "mpl-data/fonts/ttf" if spec and spec.origin else None
    return [str(folder / name)] if folder and (folder / name).exists() else []


@functools.lru_cache(maxsize=65_536)
def _lacks(font, letter: str) -> bool:
    """Whether the font draws the letter as it draws one that no font has."""
    return _drawn(font, letter) == _drawn(font, "\U000ffffd")


def _drawn(font, letter: str) -> tuple:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
