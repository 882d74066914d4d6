"""Pictures that are damaged, hostile, or no pictures: each is refused in one line, in bounded time and memory."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxmm.preprocessing import images
from mlxmm.preprocessing.images import FORMATS, UndecodableImage, decode_image
from tools.fuzz_pictures import fuzz, whole_files

ROOT = Path(__file__).parents[2]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 4)).astype(np.uint8)


def test_damaged_files_of_every_format_are_decoded_or_refused():
    counts, escapes = fuzz(2_000, seed=1)
    assert escapes == [] and counts["decoded"] > 100 and counts["refused"] > 1_000


@pytest.mark.slow
def test_twenty_thousand_damaged_files_are_decoded_or_refused():
    assert fuzz(20_000, seed=0)[1] == []


def test_only_the_formats_that_are_wanted_are_opened():
    opened = set()
    for name, data in whole_files():
        try:
            decode_image(data)
            opened.add(name)
        except UndecodableImage as error:
            # Some versions of Pillow write modes that they cannot read.
            assert (name not in FORMATS) == ("it is none of JPEG, PNG" in str(error)), (name, error)
    aliases = {"DIB", "MPO"}  # BMP and JPEG in other words
    assert {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"} <= opened <= {*FORMATS, *aliases}


def test_pipes_devices_folders_and_addresses_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    places = [tmp_path / "pipe.png", tmp_path / "link.png", tmp_path, Path("/dev/zero"), Path("/dev/stdin")]
    for place in places:
        for value in (place, str(place), {"bytes": None, "path": str(place)}):
            with pytest.raises(UndecodableImage, match="neither a file nor a link to one"):
                decode_image(value)
    with pytest.raises(UndecodableImage, match="an address, and no picture: download pictures first"):
        decode_image({"bytes": None, "path": "https://127.0.0.1/a.png"})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "L", "I;16", "1"])
def test_a_large_picture_is_converted_in_strips_to_the_same_pixels(mode, monkeypatch):
    image = Image.fromarray(NOISE).convert("L" if mode == "I;16" else "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = 0
    whole = np.asarray(decode_image(image))
    monkeypatch.setattr(images, "STRIP_PIXELS", 30 * 7)
    assert (np.asarray(decode_image(image)) == whole).all()


BOMB = """
import resource, sys
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
from mlxmm.preprocessing.images import decode_image
assert decode_image(sys.stdin.buffer.read()).size == (9999, 9999)
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "I;16"), ("GIF", "P"), ("JPEG", "RGB"), ("TIFF", "1"), ("WEBP", "RGB")],
)
def test_a_bomb_below_the_limit_of_pixels_takes_bounded_time_and_memory(kind, mode):
    file = io.BytesIO()
    Image.new(mode, (9_999, 9_999)).save(file, kind)
    command = [sys.executable, "-c", BOMB]
    done = subprocess.run(command, input=file.getvalue(), stdout=subprocess.PIPE, cwd=ROOT, check=True)
    seconds, peak = map(float, done.stdout.split())
    unit = 1024 if sys.platform == "linux" else 1
    limit = 1_900 if kind == "WEBP" else 1_100  # MiB; libwebp's own canvas has four bytes a pixel, four times
    assert seconds < 20 and peak * unit < limit * 2**20
