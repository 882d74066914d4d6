"""Images: from bytes to an RGB square of pixels, preprocessed as a CLIP or SigLIP folder says.

B pictures, H x W pixels.
"""

import functools
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import attrs
import mlx.core as mx
import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from mlxmm.errors import UserError
from mlxmm.storage.pretrained import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
# Defaults of transformers' image processors for settings that a file leaves out.
SQUARE = {"size": {"height": 224, "width": 224}, "do_center_crop": False, "image_mean": HALF, "image_std": HALF}
DEFAULTS = {
    "CLIP": {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": BICUBIC}
    | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "Siglip": SQUARE | {"resample": BICUBIC},
    "ViT": SQUARE | {"resample": BILINEAR},
}
MAX_PIXELS = 100_000_000  # 20,000 x 5,000: larger files are refused as decompression bombs
STRIP_PIXELS = 4_000_000  # pixels that are converted at once: of large pictures a strip at a time
# Pillow reads forty formats more: rarer code, and EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# What an image that was decoded once depends on.
DECODER = f"Pillow {PIL.__version__}, {' '.join(FORMATS)}, at most {MAX_PIXELS} pixels"

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_STRIP_RATIO = 16  # of a strip too long to be resized, the middle of this length (in widths) is used


class UndecodableImage(UserError):
    """A file that is not an image, or is truncated."""


def decode_image(value) -> Image.Image:
    """An RGB image from a PIL image, from bytes, from a path, or from the {"bytes", "path"} of `datasets`.

    Rotated as its EXIF says, transparency on white, the first frame of an animation.
    Raises `UndecodableImage`.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None:
        raise UndecodableImage("there is no picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and damaged EXIF
            image = value if isinstance(value, Image.Image) else Image.open(_opened(value), formats=_formats())
            if image.width * image.height > MAX_PIXELS:
                raise UndecodableImage(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
            return _to_rgb(_upright(image, is_own=image is not value))
    except UserError:
        raise
    except UnidentifiedImageError:  # which names an address in memory
        raise UndecodableImage(f"not a picture that can be decoded: it is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # of a damaged file Pillow's readers raise whatever their code happens to meet
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UndecodableImage(f"not a picture that can be decoded: {reason}") from None


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _upright(image: Image.Image, *, is_own: bool) -> Image.Image:
    """The image, rotated as its EXIF says; in place if it is ours, which copies nothing where it is upright."""
    if not is_own:
        return ImageOps.exif_transpose(image)
    ImageOps.exif_transpose(image, in_place=True)
    image.load()  # a truncated file is found here
    return image


def as_images(images) -> Sequence:
    """Images as a sequence: of one image or path, of several, or of a sequence of another kind, which is not copied.

    Raises `UndecodableImage`, which names the path.
    """
    if isinstance(images, Image.Image | str | Path):
        images = [images]
    if not isinstance(images, list | tuple):
        return images
    return [_read(image) if isinstance(image, str | Path) else image for image in images]


def _read(path: str | Path) -> Image.Image:
    try:
        return decode_image(Path(path).expanduser())
    except UndecodableImage as error:
        raise UndecodableImage(f"{path}: {error}") from None


def _opened(value):
    """What Pillow opens: a pipe or a device would be waited for, maybe for ever. Raises `UndecodableImage`."""
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise UndecodableImage("an address, and no picture: download pictures first, as by img2dataset")
    if isinstance(value, str | Path) and Path(value).exists() and not Path(value).is_file():
        raise UndecodableImage("neither a file nor a link to one")
    return value


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; a large one strip by strip, as conversions take several times its memory."""
    rows = max(1, STRIP_PIXELS // max(1, image.width))
    if image.mode == "RGB" and "transparency" not in image.info or image.height <= rows:
        return _strip_to_rgb(image)
    whole = Image.new("RGB", image.size)
    whole.info = dict(image.info)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        whole.paste(_strip_to_rgb(strip), (0, top))
    return whole


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow clips 16-bit greys at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """The image itself if it is RGB, which `convert` would copy."""
    return image if image.mode == "RGB" else image.convert("RGB")


def random_square(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The largest square of `image`, at a random place along its longer edge: the only augmentation of CLIP
    (section 2.3)."""
    side = min(image.size)
    left, top = (int(rng.integers(edge - side + 1)) for edge in image.size)
    return image.crop((left, top, left + side, top + side))


def _middle(image: Image.Image, length: int) -> Image.Image:
    """The centre of `image`, at most `length` pixels along each edge."""
    (left, right), (top, bottom) = (
        ((edge - min(edge, length)) // 2, (edge + min(edge, length)) // 2) for edge in image.size
    )
    return image.crop((left, top, right, bottom))


@attrs.frozen(kw_only=True)
class ImageProcessor:
    """Resizes, crops and normalises images as a `preprocessor_config.json` says.

    `resize` is the length of the shortest edge, or of both edges (without a crop).
    """

    image_size: int
    resize: int | tuple[int, int]
    resample: Image.Resampling = Image.Resampling.BICUBIC
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def square(cls, image_size: int) -> "ImageProcessor":
        """As CLIP: resize the shortest edge to `image_size`, then take the centre square."""
        return cls(image_size=image_size, resize=image_size)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "ImageProcessor":
        """Read `preprocessor_config.json`, or the `processor_config.json` that transformers 5 writes."""
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).exists():
                values = read_json(folder / name)
                return cls._from_hub(values.get("image_processor", values))
        raise UserError(f"{folder} has no preprocessor_config.json: is it a CLIP or SigLIP folder?")

    @classmethod
    def _from_hub(cls, values: dict) -> "ImageProcessor":
        name = values.get("image_processor_type", values.get("feature_extractor_type", "CLIP"))
        kind = next((kind for kind in DEFAULTS if name.startswith(kind)), "CLIP")
        values = DEFAULTS[kind] | values
        size = values["size"]
        if isinstance(size, int):  # as files were before 2023
            size = {"shortest_edge": size} if kind == "CLIP" else {"height": size, "width": size}
        resize = size.get("shortest_edge", (size.get("height"), size.get("width")))
        crop = values["crop_size"] if values["do_center_crop"] else resize
        height, width = (crop["height"], crop["width"]) if isinstance(crop, dict) else np.broadcast_to(crop, 2)
        is_square = height == width and None not in (height, *np.ravel(resize))
        if not is_square or not (values["do_center_crop"] or isinstance(resize, tuple)):
            raise UserError(f"pictures must come out square, of one size; preprocessing says size {size}, crop {crop}")
        return cls(
            image_size=int(height),
            resize=resize,
            resample=Image.Resampling(values["resample"]),
            mean=tuple(values["image_mean"]),
            std=tuple(values["image_std"]),
        )

    def to_hub(self) -> dict:
        """The `preprocessor_config.json` that transformers reads."""
        both = isinstance(self.resize, tuple)
        side = {"height": self.image_size, "width": self.image_size}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": dict(zip(("height", "width"), self.resize)) if both else {"shortest_edge": self.resize},
            "resample": int(self.resample),
            "do_center_crop": not both,
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(image_size, image_size, 3) uint8: loaders pass bytes on, a quarter of the size of floats."""
        image = as_rgb(image)
        if isinstance(self.resize, tuple):
            height, width = self.resize
        else:
            scale = self.resize / min(image.size)
            width, height = (max(self.resize, int(edge * scale)) for edge in image.size)
        longest = MAX_STRIP_RATIO * min(image.size)
        if width * height > MAX_PIXELS and max(image.size) > longest:  # of a strip the middle is enough
            return self.pixels(_middle(image, longest))
        if (width, height) != image.size:
            image = image.resize((width, height), self.resample)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        if (width, height) != (self.image_size, self.image_size):
            image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return np.asarray(image)

    def normalize(self, pixels: mx.array) -> mx.array:
        """(B, H, W, 3) uint8 to float32, normalised by mean and std."""
        scale = mx.array([1 / (255 * s) for s in self.std])
        shift = mx.array([m / s for m, s in zip(self.mean, self.std)])
        return pixels.astype(mx.float32) * scale - shift

    def __call__(self, images: Sequence[Image.Image]) -> mx.array:
        """PIL images to (B, H, W, 3) floats."""
        return self.normalize(mx.array(np.stack([self.pixels(image) for image in images])))
