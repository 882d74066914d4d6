"""Images made smaller before a model reads them: its time and memory grow with their pixels."""

import math

from PIL import Image


def limit_pixels(image: Image.Image, max_pixels: int) -> Image.Image:
    """`image` itself if it has at most `max_pixels`, else a smaller copy in the same shape, to within a pixel."""
    if image.width * image.height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (image.width * image.height))
    width = max(1, min(int(image.width * scale), max_pixels))
    height = max(1, min(int(image.height * scale), max_pixels // width))
    return image.resize((width, height), Image.Resampling.BICUBIC)
