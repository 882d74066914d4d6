"""Images: from bytes to an RGB square of pixels, preprocessed as a CLIP or SigLIP folder says.

B pictures, H x W pixels.
"""

import functools
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import attrs
import mlx.core as mx
import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError

from mlxmm.errors import UserError
from mlxmm.storage.pretrained import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
TURN_NAMES = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
# Defaults of transformers' image processors for settings that a file leaves out.
SQUARE = {"size": {"height": 224, "width": 224}, "do_center_crop": False, "image_mean": HALF, "image_std": HALF}
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
DEFAULTS = {
    "CLIP": STEPS
    | {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": BICUBIC}
    | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "Siglip": STEPS | SQUARE | {"resample": BICUBIC},
    "ViT": STEPS | SQUARE | {"resample": BILINEAR},
}
SUFFIXES_OF_PROCESSORS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
KNOWN_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
MAX_PIXELS = 100_000_000  # 20,000 x 5,000: larger files are refused as decompression bombs
STRIP_PIXELS = 4_000_000  # pixels that are converted at once: of large pictures a strip at a time
# Pillow reads forty formats more: rarer code, and EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# What an image that was decoded once depends on; the first number counts the changes of `decode_image` and `pixels`.
DECODER = f"3, Pillow {PIL.__version__}, at most {MAX_PIXELS} pixels"
# How to turn a picture upright, by its orientation in EXIF, and where Pillow keeps that.
TURNS = dict(zip(range(2, 9), (Image.Transpose[name] for name in TURN_NAMES)))
ORIENTATIONS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_STRIP_RATIO = 16  # of a strip too long to be resized, the middle of this length (in widths) is used


# Of large images and damaged EXIF. For one picture alone they cannot be silenced: its thread would silence all others.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
        image = value if isinstance(value, Image.Image) else Image.open(_opened(value), formats=_formats())
        if image.width * image.height > MAX_PIXELS:
            raise UndecodableImage(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
        image.load()  # a truncated file is found here
        return _to_rgb(_upright(image))
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


def _upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF says; itself where it is upright.

    Pillow's `exif_transpose` also writes the EXIF anew, and fails where one of its other values is damaged.
    """
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is None:
        return image
    image = image.transpose(turn)
    for name in ORIENTATIONS:  # it is not to be turned again
        image.info.pop(name, None)
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
    if isinstance(value, str | Path) and os.path.exists(value) and not os.path.isfile(value):
        raise UndecodableImage("neither a file nor a link to one")
    return value


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; a large one strip by strip, as conversions take several times its memory."""
    rows = max(1, STRIP_PIXELS // max(1, image.width))
    whole_only = image.mode in ("I", "F") or (image.mode == "RGB" and "transparency" not in image.info)
    if whole_only or image.height <= rows:
        return _strip_to_rgb(image)
    whole = Image.new("RGB", image.size)
    whole.info = dict(image.info)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        whole.paste(_strip_to_rgb(strip), (0, top))
    return whole


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return as_rgb(image)


def _grey(image: Image.Image) -> Image.Image:
    """An 8-bit image of one with more bits: Pillow clips at 255 instead of scaling.

    Of 32-bit integers and of floats the largest value says whether white is 1 (of floats), 255 or 65,535.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    is_16_bit = image.mode.startswith("I;16") or image.format == "PNG"  # older Pillows open such a PNG as 32 bits
    top = 65_535 if is_16_bit else values.max(initial=0)
    white = 1 if image.mode == "F" and top <= 1 else 255 if top <= 255 else 65_535
    return Image.fromarray((values * (255 / white)).clip(0, 255).astype(np.uint8))


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


def _model_kind(folder: Path) -> str:
    """The kind of processor that transformers takes for the model in a folder, where its own file names none."""
    path = folder / "config.json"
    model = str(read_json(path).get("model_type")) if path.exists() else "clip"
    return next((kind for kind in DEFAULTS if model.startswith(kind.lower())), "CLIP")


def _processor_kind(values: dict, default: str) -> str:
    """One of `DEFAULTS`. Raises `UserError` for a processor that does other things."""
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    kinds = {f"{kind}{suffix}": kind for kind in DEFAULTS for suffix in SUFFIXES_OF_PROCESSORS}
    if name is not None and name not in kinds:
        raise UserError(f"preprocessing by {name} is not known: those of {', '.join(DEFAULTS)} are")
    return kinds[name] if name is not None else default


def _check_steps(values: dict) -> None:
    """Raise `UserError` for a step that is not taken here."""
    if not values["do_resize"]:
        raise UserError("pictures must come out square, of one size; preprocessing says do_resize false")
    others = [name for name, value in values.items() if name.startswith("do_") and value and name not in KNOWN_STEPS]
    if others:
        raise UserError(f"preprocessing says {', '.join(others)}, which is not known")


def _edges(size, *, is_square: bool) -> dict:
    """A size as an object: files before 2023 have one number, and some a list."""
    if isinstance(size, int):
        return {"height": size, "width": size} if is_square else {"shortest_edge": size}
    return dict(zip(("height", "width"), size, strict=True)) if isinstance(size, list) else dict(size)


def _of_channels(value) -> tuple[float, float, float]:
    """A number for each channel, of a list or of one for all."""
    one, two, three = np.broadcast_to(np.array(value, dtype=float), 3).tolist()
    if not np.isfinite([one, two, three]).all():
        raise ValueError(f"three numbers were expected, {value!r} came")
    return one, two, three


def _positive(value):
    if isinstance(value, bool) or not value > 0:
        raise ValueError(f"a number above 0 was expected, {value!r} came")
    return value


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
    rescale_factor: float = 1 / 255

    @classmethod
    def square(cls, image_size: int) -> "ImageProcessor":
        """As CLIP: resize the shortest edge to `image_size`, then take the centre square."""
        return cls(image_size=image_size, resize=image_size)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "ImageProcessor":
        """Read `preprocessor_config.json`, or the `processor_config.json` that transformers 5 writes."""
        nested = folder / "processor_config.json"
        values = read_json(nested).get("image_processor") if nested.exists() else None
        if values is None and not (folder / "preprocessor_config.json").exists():
            raise UserError(f"{folder} has no preprocessor_config.json: is it a CLIP or SigLIP folder?")
        values = read_json(folder / "preprocessor_config.json") if values is None else values
        try:
            return cls._from_hub(values, _model_kind(folder))
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"the preprocessing of {folder} is damaged: {type(error).__name__}: {error}") from None

    @classmethod
    def _from_hub(cls, values: dict, kind: str = "CLIP") -> "ImageProcessor":
        """Of the values of a file; `kind` is that of processors that it does not name."""
        kind = _processor_kind(values, kind)
        values = DEFAULTS[kind] | values
        _check_steps(values)
        size = _edges(values["size"], is_square=kind != "CLIP")
        resize = size.get("shortest_edge", (size.get("height"), size.get("width")))
        crop = _edges(values["crop_size"], is_square=True) if values["do_center_crop"] else size
        height, width = crop.get("height"), crop.get("width")
        is_square = height == width and None not in (height, *np.ravel(resize)) and "longest_edge" not in size
        if not is_square:
            crop = values["crop_size"] if values["do_center_crop"] else "none"
            raise UserError(f"pictures must come out square, of one size; preprocessing says size {size}, crop {crop}")
        normalizes = values["do_normalize"]
        return cls(
            image_size=_positive(height),
            resize=tuple(map(_positive, resize)) if isinstance(resize, tuple) else _positive(resize),
            resample=Image.Resampling(values["resample"]),
            mean=_of_channels(values["image_mean"]) if normalizes else (0.0,) * 3,
            std=tuple(map(_positive, _of_channels(values["image_std"]))) if normalizes else (1.0,) * 3,
            rescale_factor=float(_positive(values["rescale_factor"])) if values["do_rescale"] else 1.0,
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
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(image_size, image_size, 3) uint8 of any PIL image: loaders pass bytes on, a quarter of the size of floats.

        Raises `UndecodableImage`.
        """
        image = decode_image(image)
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

    def pixels_of(self, row: dict) -> np.ndarray:
        """The `pixels` of a row's "image"; those that it has where they are cached."""
        return row["pixels"] if "pixels" in row else self.pixels(row["image"])

    def normalize(self, pixels: mx.array) -> mx.array:
        """(B, H, W, 3) uint8 to float32, normalised by mean and std."""
        scale = mx.array([1 / (1 / self.rescale_factor * s) for s in self.std])
        shift = mx.array([m / s for m, s in zip(self.mean, self.std)])
        return pixels.astype(mx.float32) * scale - shift

    def __call__(self, images: Sequence[Image.Image]) -> mx.array:
        """PIL images to (B, H, W, 3) floats."""
        return self.normalize(mx.array(np.stack([self.pixels(image) for image in images])))
