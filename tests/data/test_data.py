"""Data: splits that hold what they say, orders that are functions of (seed, epoch), sources that say what is wrong."""

import io
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxmm.cli import parse_config
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import BatchConfig, CaptionDataConfig, open_source
from mlxmm.data.loader import Loader
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar, ShapesTexts
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import ImageProcessor, UndecodableImage, decode_image
from mlxmm.preprocessing.tokenizers import train_tokenizer


def png(colour="red", size=(20, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make_parquet(tmp_path):
    def make(images, captions=None, **columns):
        import datasets

        captions = captions or [[f"picture {i}", f"number {i}"] for i in range(len(images))]
        rows = {"image": [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]}
        table = datasets.Dataset.from_dict(rows | {"caption": captions} | columns)
        table = table.cast_column("image", datasets.Image(decode=False))
        path = tmp_path / "rows.parquet"
        table.to_parquet(path)
        return str(path)

    return make


@pytest.mark.parametrize("seed", [0, 1])
def test_training_scenes_hold_nothing_that_is_held_out(seed):
    grammar = ShapesGrammar(ShapesConfig(), seed)
    held_out = {f"{colour} {shape}" for colour, shape in grammar.unseen_attributes}
    rows = grammar.rows(seed)
    train = [rows["train"][i]["captions"][0] for i in range(400)]
    assert not any(words in caption for caption in train for words in held_out)
    unseen = {row["captions"][0] for row in (rows["test_unseen"][i] for i in range(100))}
    assert not unseen & {rows["train"][i]["captions"][0] for i in range(2_000)}
    attributes = [rows["test_unseen_attributes"][i]["captions"][0] for i in range(50)]
    assert all(any(words in caption for words in held_out) for caption in attributes)


def test_scenes_of_one_object_have_no_split_of_unseen_pairs():
    """Such a scene would be sought for ever."""
    config = ShapesConfig(max_objects=1, num_train=4, num_val=2, num_test=2)
    rows = ShapesGrammar(config, 0).rows(0)
    assert list(rows) == ["train", "val", "test", "test_unseen_attributes"]
    assert all(split[len(split) - 1]["captions"] for split in rows.values())


def test_a_scene_is_a_function_of_seed_split_epoch_and_index():
    one, two = (ShapesGrammar(ShapesConfig(), 3).rows(3, epoch=2)["train"] for _ in range(2))
    assert np.array_equal(one[5]["image"], two[5]["image"]) and one[5]["captions"] == two[5]["captions"]
    other = ShapesGrammar(ShapesConfig(), 3).rows(3, epoch=1)["train"]
    assert not np.array_equal(one[5]["image"], other[5]["image"])


def test_the_picture_shows_what_the_caption_says():
    rows = ShapesGrammar(ShapesConfig(image_size=64), 0).rows(0)["test"]
    pairs = [
        row for row in (rows[i] for i in range(80)) if "red" in row["captions"][0] and "blue" in row["captions"][0]
    ]
    assert pairs
    for row in pairs:
        pixels = np.asarray(row["image"]).astype(int)
        red = np.argwhere(pixels[..., 0] - pixels[..., 2] > 120).mean(0)
        blue = np.argwhere(pixels[..., 2] - pixels[..., 0] > 120).mean(0)
        first, second = (
            (red, blue) if row["captions"][0].index("red") < row["captions"][0].index("blue") else (blue, red)
        )
        axis = 0 if "above" in row["captions"][0] else 1
        assert first[axis] < second[axis], row["captions"][0]


def test_notes_say_what_stands_where_and_nothing_else():
    texts = ShapesTexts(ShapesGrammar(ShapesConfig(), 0), 0)
    for i in range(200):
        notes, caption = texts[i]
        words = notes.split()
        assert len(words) == 16 and set(words) - {"."} <= set(caption.split())


def test_an_epoch_resumed_gives_the_batches_it_would_have_given():
    def transform(row, rng):
        return {"row": np.array(row), "draw": np.array(rng.integers(1_000))}

    loader = Loader(rows=range(25), transform=transform, batch_size=4, seed=5, shuffle=True)
    whole = list(loader.epoch(2))
    assert len(whole) == len(loader) == 7 and sorted(np.concatenate([b["row"] for b in whole])) == list(range(25))
    for resumed, batch in zip(loader.epoch(2, start=3), whole[3:], strict=True):
        assert all(np.array_equal(resumed[name], batch[name]) for name in batch)
    assert not np.array_equal(next(loader.epoch(1))["row"], whole[0]["row"])


def test_batches_by_length_pad_little_and_are_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, 70).tolist()

    def batches(epoch, start=0, **settings):
        loader = Loader(
            rows=range(70), transform=lambda row, rng: {"row": np.array(row)}, batch_size=8, shuffle=True, **settings
        )
        return [batch["row"].tolist() for batch in loader.epoch(epoch, start)]

    def padding(rows):
        return sum(max(lengths[row] for row in batch) - lengths[row] for batch in rows for row in batch)

    sorted_ones = batches(1, lengths=lengths)
    assert sorted(row for batch in sorted_ones for row in batch) == list(range(70))
    assert padding(sorted_ones) < padding(batches(1)) / 4
    assert batches(1, 3, lengths=lengths) == sorted_ones[3:] and batches(2, lengths=lengths) != sorted_ones


def test_batches_do_not_depend_on_the_number_of_threads():
    def transform(row, rng):
        time.sleep(rng.random() / 500)  # some examples take longer than those after them
        return {"row": np.array(row), "draw": np.array(rng.integers(1_000))}

    def batches(num_threads):
        loader = Loader(rows=range(60), transform=transform, batch_size=4, shuffle=True, num_threads=num_threads)
        return [{name: array.tolist() for name, array in batch.items()} for batch in loader.epoch(1)]

    assert batches(1) == batches(3) == batches(8)


def test_more_threads_than_batches_are_held_ready_is_no_warning(caplog):
    loader = Loader(rows=range(60), transform=lambda row, rng: {"row": np.array(row)}, batch_size=4, num_threads=8)
    next(loader.epoch(0))
    assert not caplog.records


def test_threads_are_the_cores_of_this_process_unless_a_number_is_given(monkeypatch):
    cores = iter([None, 1, 4, 64])
    monkeypatch.setattr(os, "cpu_count", lambda: next(cores))
    assert [BatchConfig().num_decoding_threads for _ in range(4)] == [1, 1, 4, 8]
    assert BatchConfig(num_threads=3).num_decoding_threads == 3


def test_five_captions_train_one_a_picture_and_the_first_validates(make_parquet):
    captions = [[f"picture {i} caption {j}" for j in range(5)] for i in range(8)]
    path = make_parquet([png()] * 8, captions, split=["train"] * 6 + ["val", "test"])
    config = CaptionDataConfig(source=path, split_column="split", batch_size=6)
    seen = []
    data = CaptionData(
        open_source(config, 0), transform=lambda row, caption: seen.append(caption) or {"x": np.zeros(1)}
    )
    for epoch in range(8):
        list(data.train_dataloader().epoch(epoch))
    assert len(seen) == 48 and {caption.split()[1] for caption in seen} == set("012345")
    assert {caption.split()[3] for caption in seen} == set("01234")
    seen.clear()
    list(data.val_dataloader().epoch(0))
    assert seen == ["picture 6 caption 0"]
    assert len(data.source.texts()) == 30


def test_an_image_folder_is_read_with_its_captions(tmp_path):
    lines = []
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(png())
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": f"picture {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = open_source(CaptionDataConfig(source=str(tmp_path)), 0)
    assert [len(data.rows[split]) for split in ("train", "val", "test")] == [36, 2, 2]
    assert data.rows["train"][0]["captions"][0].startswith("picture")


def test_a_picture_that_cannot_be_decoded_is_skipped_and_named(make_parquet, capsys):
    images = [png()] * 200
    images[7] = png()[:60]
    path = make_parquet(images, split=["train"] * 180 + ["val", "test"] * 10)
    data = open_source(CaptionDataConfig(source=path, split_column="split"), 0)
    assert len(data.rows["train"]) == 179 and data.skipped == ("7.png (row 7)",)
    assert "7.png" in capsys.readouterr().out


def test_more_than_one_bad_picture_in_a_hundred_stops_the_run_and_names_five(make_parquet):
    images = [png()] * 94 + [b"no picture"] * 6
    config = CaptionDataConfig(
        source=make_parquet(images, split=["val", "test"] * 10 + ["train"] * 80), split_column="split"
    )
    with pytest.raises(UserError, match=r"6 of 100 .*94\.png.*98\.png") as caught:
        open_source(config, 0)
    assert "99.png" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_caption_missing_in_a_hundred_rows_is_skipped_and_named(make_parquet, capsys):
    captions = [["", "  "] if i == 7 else [f"picture {i}", ""] for i in range(220)]
    data = open_source(CaptionDataConfig(source=make_parquet([png()] * 220, captions)), 0)
    assert data.skipped == ("7.png (row 7)",) and "skipped, has no caption: 7.png (row 7)\n" in capsys.readouterr().out
    assert sum(map(len, data.rows.values())) == 219 and "picture 8" in data.rows["train"].captions()


@pytest.mark.parametrize("fault", ["decoded", "caption"])
def test_five_bad_rows_of_few_are_left_out_by_name_and_six_or_half_are_not(make_parquet, capsys, fault):
    def opened(num_bad, num):
        images = [b"no picture" if fault == "decoded" and i < num_bad else png() for i in range(num)]
        captions = ["" if fault == "caption" and i < num_bad else f"picture {i}" for i in range(num)]
        path = make_parquet(images, captions, split=["train"] * (num - 2) + ["val", "test"])
        return open_source(CaptionDataConfig(source=path, split_column="split"), 0)

    assert len(opened(1, 54).skipped) == 1
    assert len(opened(5, 54).skipped) == 5
    assert re.search(rf"skipped, .*{fault}.*: 4.png", capsys.readouterr().out)
    with pytest.raises(UserError, match=r"6 of 54 .*, more than one in a hundred and more than 5; fix them"):
        opened(6, 54)
    with pytest.raises(UserError, match=r"5 of 10 .*, half of them or more; fix them"):
        opened(5, 10)


def test_too_few_rows_to_divide_are_said_so(tmp_path, make_parquet):
    for number in (1, 2):
        with pytest.raises(UserError, match=rf"has {number} rows?: train, val, test need one each"):
            open_source(CaptionDataConfig(source=make_parquet([png()] * number)), 0)
    (tmp_path / "pics").mkdir()
    for i in range(12):
        (tmp_path / "pics" / f"{i:02}.png").write_bytes(png())
    (tmp_path / "c.csv").write_text("file_name,caption\n03.png,a thing\n")
    config = CaptionDataConfig(source=str(tmp_path / "pics"), captions=(str(tmp_path / "c.csv"),))
    with pytest.raises(UserError, match="has 1 row with a caption: train, val, test need one each"):
        open_source(config, 0)


def test_pictures_beside_metadata_that_have_texts_are_counted_and_more_than_five_end_in_dots(tmp_path, capsys):
    for i in range(18):
        (tmp_path / f"{i:02}.png").write_bytes(png())
    for i in range(10, 14):
        (tmp_path / f"{i:02}.txt").write_text("a thing")
    lines = [json.dumps({"file_name": f"{i:02}.png", "caption": "a thing"}) for i in range(10)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    open_source(CaptionDataConfig(source=str(tmp_path)), 0)
    line = next(line for line in capsys.readouterr().out.splitlines() if "do not name" in line)
    assert line.endswith("14.png, …; 4 of them have a .txt, which is read only where there are no metadata")


def test_pictures_that_the_metadata_do_not_name_are_counted_and_named(tmp_path, capsys):
    for i in range(12):
        (tmp_path / f"{i:02}.png").write_bytes(png())
    lines = [json.dumps({"file_name": f"{i:02}.png", "caption": "a thing"}) for i in range(10)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    open_source(CaptionDataConfig(source=str(tmp_path)), 0)
    names = f"{tmp_path / '10.png'}, {tmp_path / '11.png'}"
    assert f"skipped, 2 pictures that the metadata do not name: {names}\n" in capsys.readouterr().out
    (tmp_path / "10.png").unlink(), (tmp_path / "11.png").unlink()
    open_source(CaptionDataConfig(source=str(tmp_path)), 0)
    assert "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "no/such/file.parquet"}, "is not there"),
        ({"image_column": "picture"}, "no column 'picture'; it has image, caption"),
        ({"split_column": "part"}, "no column 'part'"),
    ],
)
def test_a_source_that_does_not_fit_is_one_clear_line(make_parquet, settings, message):
    config = CaptionDataConfig(**({"source": make_parquet([png()] * 4)} | settings))
    with pytest.raises(UserError, match=message) as caught:
        open_source(config, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_revision_in_the_source_is_that_of_the_flag(monkeypatch, streaming):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or 1 / 0)
    revision = "refs/convert/parquet"
    for settings in ({"source": f"user/name@{revision}"}, {"source": "user/name", "revision": revision}):
        with pytest.raises(UserError, match="ZeroDivisionError"):
            open_source(CaptionDataConfig(**settings, streaming=streaming), 0)
    assert asked[0] == asked[1] and asked[0][0] == ("user/name",) and asked[0][1]["revision"] == revision


def test_a_source_with_two_revisions_is_one_clear_line_as_soon_as_the_flags_are_read():
    from recipes.train_clip import PRESETS

    with pytest.raises(UserError, match="user/name@v1 names a revision already: leave out v2") as caught:
        parse_config("train_clip", PRESETS, ["--data.source", "user/name@v1", "--data.revision", "v2"])
    assert "\n" not in str(caught.value)


def test_files_and_folders_with_an_at_sign_are_opened(make_parquet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name@v1").mkdir(parents=True)
    path = Path(make_parquet([png()] * 40))
    for source in ("user/rows@v1.parquet", "user/name@v1/rows.parquet"):
        (tmp_path / source).write_bytes(path.read_bytes())
    for source in ("user/rows@v1.parquet", "user/rows@*.parquet", "user/name@v1"):
        assert len(open_source(CaptionDataConfig(source=source), 0).rows["train"]) == 36
    with pytest.raises(UserError, match="user/gone@v1.parquet is not there"):
        open_source(CaptionDataConfig(source="user/gone@v1.parquet"), 0)


def test_pictures_of_every_mode_become_rgb_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(half).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))
    assert decode_image(grey).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(Image.new("CMYK", (4, 4))).mode == decode_image(Image.new("P", (1, 1))).mode == "RGB"
    for value in (png()[:50], None):
        with pytest.raises(UndecodableImage):
            decode_image(value)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def two_halves(size=(20, 10)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        settings = {"lossless": True} if kind == "WEBP" else {}
        image = decode_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings))
        assert image.mode == "RGB" and image.getpixel((3, 2)) == (255, 0, 0), kind


def test_a_picture_is_turned_as_its_exif_says():
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees, clockwise
    image = decode_image(encoded(two_halves(), "PNG", exif=turned))
    assert image.size == (10, 20)
    assert image.getpixel((5, 2)) == (255, 0, 0) and image.getpixel((5, 17)) == (0, 0, 255)


def test_colours_of_palettes_inks_and_16_bits_are_the_colours_they_stand_for():
    palette = decode_image(encoded(two_halves().convert("P"), "PNG"))
    assert palette.getpixel((2, 2)) == (255, 0, 0) and palette.getpixel((17, 2)) == (0, 0, 255)
    clear = encoded(Image.new("P", (4, 4), 0), "PNG", transparency=0)
    assert decode_image(clear).getpixel((1, 1)) == (255, 255, 255)
    inks = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.asarray(inks).astype(int) - [255, 0, 0]).max() < 12
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(1, 16)
    for kind in ("PNG", "TIFF"):
        grey = np.asarray(decode_image(encoded(Image.fromarray(ramp), kind)))[0, :, 0]
        assert np.abs(grey.astype(int) - np.linspace(0, 255, 16)).max() <= 1, kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_a_picture_cut_short_is_one_clear_line(kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), kind)
    for part in (b"", whole[:12], whole[: len(whole) // 2]):
        with pytest.raises(UndecodableImage, match="not a picture that can be decoded") as caught:
            decode_image(part)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (20_000, 30), (3, 900), (1_000_000, 1)])
def test_the_middle_of_a_picture_of_any_shape_fills_the_square(size):
    image = decode_image(encoded(Image.new("RGB", size, "red"), "PNG"))
    for processor in (ImageProcessor.square(24), ImageProcessor(image_size=24, resize=(24, 24))):
        assert (processor.pixels(image) == (255, 0, 0)).all()
    pixels = ImageProcessor.square(224).pixels(two_halves(size) if size[0] > size[1] else image)
    assert pixels.shape == (224, 224, 3)
    if size[0] > size[1]:
        assert (pixels[:, 0] == (255, 0, 0)).all() and (pixels[:, -1] == (0, 0, 255)).all()


def test_a_picture_of_too_many_pixels_is_one_clear_line():
    bomb = encoded(Image.new("1", (20_000, 5_001)), "PNG")
    with pytest.raises(UndecodableImage, match="20000x5001 pixels are more than 100,000,000"):
        decode_image(bomb)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip", {"size": {"shortest_edge": 27}, "crop_size": {"height": 24, "width": 24}}),
        ("clip", {"size": 24, "crop_size": 24}),  # as files were before 2023
        ("siglip", {"size": {"height": 24, "width": 24}}),
        ("vit", {"size": {"height": 24, "width": 24}}),
        ("vit", {"size": 24}),
    ],
)
@pytest.mark.parametrize("layout", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_are_those_of_transformers(name, settings, layout, tmp_path):
    import importlib

    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    theirs = getattr(module, {"clip": "CLIP", "siglip": "Siglip", "vit": "ViT"}[name] + "ImageProcessorPil")(**settings)
    kind = theirs.to_dict()["image_processor_type"]
    for values in (theirs.to_dict(), {"image_processor_type": kind} | settings):  # all settings, and the bare ones
        nested = {"image_processor": values} if layout == "processor_config.json" else values
        (tmp_path / layout).write_text(json.dumps(nested))
        ours = ImageProcessor.from_pretrained(tmp_path)
        for width, height in [(40, 30), (31, 97), (10, 24), (24, 24), (1, 1)]:
            noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
            assert np.abs(np.array(ours([image])[0]) - expected).max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 24}, "do_center_crop": False},
        {"size": {"height": 24, "width": 32}, "do_center_crop": False},
        {"size": {"longest_edge": 24}},
        {"crop_size": {"height": 24, "width": 32}},
    ],
)
def test_preprocessing_that_leaves_pictures_of_different_sizes_is_one_clear_line(settings, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="pictures must come out square"):
        ImageProcessor.from_pretrained(tmp_path)


def test_preprocessing_survives_its_own_config():
    for processor in (ImageProcessor.square(32), ImageProcessor(image_size=24, resize=(24, 24))):
        assert ImageProcessor._from_hub(processor.to_hub()) == processor
        assert processor([Image.new("RGB", (50, 40))]).shape == (
            1,
            processor.image_size,
            processor.image_size,
            3,
        )


def test_a_tokenizer_reads_back_what_it_wrote_even_letters_it_never_saw():
    tokenizer = train_tokenizer(["a small red circle", "a large blue square"], 400)
    text = "a large red süß ✓"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
    assert len(tokenizer("a small red circle")["input_ids"]) == 4
