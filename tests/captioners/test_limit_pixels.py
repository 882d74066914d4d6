"""Images are made smaller in their shape, and never larger."""

import pytest
from PIL import Image

from mlxmm.captioners.limit_pixels import limit_pixels


@pytest.mark.parametrize(
    ("size", "max_pixels", "expected"),
    [
        ((100, 50), 5000, (100, 50)),
        ((100, 50), 4999, (99, 49)),
        ((400, 200), 5000, (100, 50)),
        ((1, 9000), 1000, (1, 1000)),  # strips stay at least a pixel wide
        ((9000, 1), 1000, (1000, 1)),
    ],
)
def test_an_image_has_at_most_so_many_pixels_and_keeps_its_shape(size, max_pixels, expected):
    assert limit_pixels(Image.new("RGB", size), max_pixels).size == expected


def test_an_image_that_is_small_enough_is_not_copied():
    image = Image.new("RGB", (3, 4))
    assert limit_pixels(image, 12) is image
