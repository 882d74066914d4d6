"""Pictures and their preprocessing: what transformers and Pillow do, or one line."""

import importlib
import io
import json
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features

from mlxmm.errors import UserError
from mlxmm.preprocessing.images import ImageProcessor, UndecodableImage, decode_image

KINDS = {"clip": "CLIP", "siglip": "Siglip", "vit": "ViT"}
SQUARE = {"size": {"height": 12, "width": 12}}
SIDE = {"size": {"shortest_edge": 14}, "crop_size": {"height": 12, "width": 12}}


def theirs(kind: str, **settings):
    module = importlib.import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    return getattr(module, f"{KINDS[kind]}ImageProcessorPil")(**settings)


def written(folder, values: dict, name: str = "preprocessor_config.json") -> ImageProcessor:
    (folder / name).write_text(json.dumps(values))
    return ImageProcessor.from_pretrained(folder)


def noise(width=20, height=17) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def assert_same(ours: ImageProcessor, processor) -> None:
    expected = processor(noise(), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(np.array(ours([noise()])[0]) - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.5, "image_std": 0.25},
        {"do_normalize": None, "image_mean": None},
        {"resample": 0},
        {"do_convert_rgb": False},
    ],
    ids=str,
)
def test_each_setting_gives_the_pixels_of_transformers(kind, settings, tmp_path):
    sizes = SIDE if kind == "clip" else SQUARE
    given = {"image_processor_type": f"{KINDS[kind]}ImageProcessor"} | sizes | settings
    ours = written(tmp_path, given)
    assert_same(ours, theirs(kind, **sizes | settings))
    assert_same(ImageProcessor._from_hub(ours.to_hub()), theirs(kind, **sizes | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "preprocessing says do_resize false"),
        ({"do_pad": True}, "preprocessing says do_pad, which is not known"),
        ({"image_processor_type": "DeiTImageProcessor"}, "preprocessing by DeiTImageProcessor is not known"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "by Siglip2ImageProcessor is not known"),
        ({"feature_extractor_type": "ConvNextFeatureExtractor"}, "by ConvNextFeatureExtractor is not known"),
        ({"size": {"shortest_edge": 14, "longest_edge": 20}}, "pictures must come out square"),
        ({"size": 0}, "is damaged: ValueError: a number above 0 was expected, 0 came"),
        ({"size": "large"}, "is damaged"),
        ({"resample": 17}, "is damaged: ValueError: 17 is not a valid Resampling"),
        ({"image_std": [0.5, 0.0, 0.5]}, "a number above 0 was expected, 0.0 came"),
        ({"image_mean": [0.5, 0.5]}, "is damaged: ValueError"),
        ({"image_mean": None}, "three numbers were expected, None came"),
        ({"resample": None}, "None is not a valid Resampling"),
        ({"size": None}, "is damaged"),
        ({"image_mean": "grey"}, "is damaged: ValueError"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_obeyed_is_refused_in_one_line(settings, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        written(tmp_path, SIDE | settings)
    assert "\n" not in str(error.value)


def test_a_nested_processor_wins_over_an_older_file_as_in_transformers(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SIDE))
    newer = {"image_processor": {"image_processor_type": "SiglipImageProcessor", **SQUARE}}
    assert written(tmp_path, newer, "processor_config.json").mean == (0.5, 0.5, 0.5)
    other = {"processor_class": "LlavaProcessor"}  # which says nothing of pictures
    assert written(tmp_path, other, "processor_config.json").mean[0] == pytest.approx(0.48145466)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_names_no_processor_is_read_as_that_of_its_model(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    sizes = SIDE if kind == "clip" else SQUARE
    assert_same(written(tmp_path, sizes), theirs(kind, **sizes))


def with_exif(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """A JPEG of red, then blue; its EXIF has these entries: tag, type, count, and four bytes."""
    picture = Image.new("RGB", (20, 10), "red")
    picture.paste("blue", (10, 0, 20, 10))
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return encoded(picture, "JPEG", quality=95, exif=head + body + b"\0\0\0\0")


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    "other",
    [
        (0x0128, 2, 4, b"cm\0\0"),  # ResolutionUnit as a text
        (0x0100, 2, 4, b"wide"),  # ImageWidth as a text
        (0x011A, 10, 1, struct.pack("<I", 6)),  # a rational that begins in the header
    ],
)
def test_a_picture_is_turned_whatever_else_its_exif_says(other):
    entries = sorted([TURNED, other])
    assert decode_image(with_exif([TURNED])).size == (10, 20)
    assert decode_image(with_exif(entries)).size == (10, 20)


def test_a_rational_of_minus_one_over_zero_in_exif_does_not_end_a_run():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, TiffImagePlugin.IFDRational(1, 1)
    damaged = exif.tobytes().replace(struct.pack("<II", 1, 1), struct.pack("<iI", -1, 0))
    damaged = damaged.replace(struct.pack(">II", 1, 1), struct.pack(">iI", -1, 0))
    assert decode_image(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=damaged)).size == (10, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_that_of_pillow_and_is_not_turned_again(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), "PNG", exif=exif)
    once = decode_image(data)
    assert np.array_equal(once, ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(once), once)
    again = decode_image(encoded(once, "PNG", exif=once.getexif()))  # written with what is left of its EXIF
    assert again.size == once.size


KINDS_OF_FILES = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "DDS", "TGA", "PCX", "ICO", "SGI", "JPEG2000"]
KINDS_OF_FILES += ["AVIF"] if features.check("avif") else []


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_a_damaged_file_of_any_kind_is_a_picture_or_undecodable(kind):
    whole = bytearray(encoded(noise(32, 32), kind))
    rng = np.random.default_rng(0)
    for number in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) if number % 2 else min(200, len(data)), 4):
            data[place] = rng.integers(256)
        try:
            assert decode_image(bytes(data[: int(rng.integers(len(data) + 1))] if number % 3 == 0 else data))
        except UndecodableImage as error:
            assert "\n" not in str(error)


def test_whole_numbers_of_32_bits_and_floats_are_scaled_by_what_they_hold(tmp_path):
    ramp = np.linspace(0, 255, 16).round().reshape(1, 16)
    for values, kind in [
        (ramp.astype(np.int32), "TIFF"),
        ((ramp * 257).astype(np.int32), "TIFF"),
        (ramp.astype(np.float32), "TIFF"),
        ((ramp / 255).astype(np.float32), "TIFF"),
        ((ramp * 257).astype(np.float32), "TIFF"),
        ((ramp * 257).astype(np.uint16), "PNG"),
    ]:
        grey = np.asarray(decode_image(encoded(Image.fromarray(values), kind)))[0, :, 0]
        assert np.abs(grey - ramp[0]).max() <= 1, (values.dtype, values.max())
    dark = np.full((1, 16), 200, dtype=np.uint16)  # of 65,535
    assert np.asarray(decode_image(encoded(Image.fromarray(dark), "PNG"))).max() <= 1
    assert np.asarray(decode_image(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))).max() == 0


def opened(image: Image.Image, kind: str, **settings) -> tuple[Image.Image, Image.Image]:
    data = encoded(image, kind, **settings)
    return Image.open(io.BytesIO(data)), decode_image(data)


def test_a_picture_given_from_python_has_the_pixels_of_its_file():
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    grey = Image.fromarray(np.full((20, 20), 127 * 257, dtype=np.uint16))
    processor = ImageProcessor.square(12)
    for image, kind, settings in [(clear, "PNG", {}), (grey, "PNG", {}), (noise(20, 40), "JPEG", {"exif": turned})]:
        given, of_file = opened(image, kind, **settings)
        assert np.array_equal(processor.pixels(given), processor.pixels(of_file))
    assert processor.pixels(clear).min() == 255 and (processor.pixels(grey) == 127).all()


def test_a_picture_cut_short_that_is_given_from_python_is_one_line():
    data = encoded(noise(64, 64), "PNG")
    with pytest.raises(UserError, match="not a picture that can be decoded"):
        ImageProcessor.square(12)([Image.open(io.BytesIO(data[: len(data) // 2]))])


def test_pictures_decoded_in_threads_hide_no_warning_of_others():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoded = [pool.submit(decode_image, buffer.getvalue()) for _ in range(400)]
        told = 0
        while not all(one.done() for one in decoded):
            warnings.warn("seen", stacklevel=1)
            told += 1
    assert sum(str(one.message) == "seen" for one in caught) == told > 10
