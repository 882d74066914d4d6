"""What a CLIP is given that is odd or wrong: the right thing, or one clear line and exit code 2."""

import json
import shutil
import sys

import datasets
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from small_clip import small_clip

from mlxmm.cli import run_recipe
from mlxmm.config import Preset
from recipes import evaluate_clip, zero_shot


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "model"
    small_clip().save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs a recipe as its command line does: exit code, lines of output, lines of errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "cache"))

    def run(recipe, *flags):
        monkeypatch.setattr(sys, "argv", [recipe.__name__, *map(str, flags)])
        code = 0
        try:
            run_recipe(
                recipe.__name__.rpartition(".")[2],
                recipe.main,
                {"default": Preset("", recipe.Config(module=str(model)))},
            )
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


def two_halves() -> Image.Image:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    return image


def save_each_kind(folder) -> dict[str, Image.Image]:
    """Pictures of all kinds in `folder`, by name, with the plain RGB that each stands for."""
    plain, turned = two_halves(), Image.Exif()
    turned[0x0112] = 6  # to be shown rotated by 90 degrees, clockwise
    Image.new("RGB", (1, 1), "red").save(folder / "1x1.png")
    plain.convert("CMYK").save(folder / "cmyk.tiff")
    ramp = (np.arange(800).reshape(20, 40) % 256).astype(np.uint8)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "16-bit.png")
    plain.convert("P").save(folder / "palette.png")
    plain.save(folder / "animated.png", save_all=True, append_images=[Image.new("RGB", (40, 20), "green")])
    plain.save(folder / "exif.png", exif=turned)
    Image.new("RGB", (20_000, 30), "red").save(folder / "wide.png")
    return {
        "1x1.png": Image.new("RGB", (16, 16), "red"),
        "cmyk.tiff": plain,
        "16-bit.png": Image.fromarray(ramp).convert("RGB"),
        "palette.png": plain,
        "animated.png": plain,
        "exif.png": plain.rotate(-90, expand=True),
        "wide.png": Image.new("RGB", (16, 16), "red"),
    }


def test_pictures_of_every_kind_are_classified_as_the_plain_ones_they_stand_for(run, tmp_path):
    plain = save_each_kind(tmp_path)
    (tmp_path / "plain").mkdir()
    for name, image in plain.items():
        image.save(tmp_path / "plain" / f"{name}.png")
    odd, even = (
        run(zero_shot, "--classes", "cat,dog,red circle", *paths)
        for paths in (plain, [f"plain/{name}.png" for name in plain])
    )
    assert odd[0] == even[0] == 0 and not odd[2] and len(odd[1]) == len(plain)
    assert [line.split()[1:] for line in odd[1]] == [line.split()[1:] for line in even[1]]
    assert len({tuple(line.split()[1:]) for line in odd[1]}) > 2  # the classifier does tell pictures apart


def test_pictures_of_every_kind_are_judged(run, tmp_path):
    names = list(save_each_kind(tmp_path)) * 3
    rows = {"image": [str(tmp_path / name) for name in names], "caption": [f"picture of {name}" for name in names]}
    table = datasets.Dataset.from_dict(rows | {"split": ["train"] * 7 + ["val"] * 7 + ["test"] * 7})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    source = ["--data.source", "rows.parquet", "--data.split-column", "split", "--class-column", "caption"]
    code, _, errors = run(evaluate_clip, *source, "--run-dir", "judged")
    assert code == 0, errors
    figures = json.loads((tmp_path / "judged" / "summary.json").read_text())
    assert figures["zero_shot/top1_chance"] == pytest.approx(1 / 7) and 0 <= figures["zero_shot/top1"] <= 1


def assert_one_line(result, message: str) -> None:
    code, _, errors = result
    assert code == 2 and len(errors) == 1 and message in errors[0] and errors[0].startswith("error: "), errors


@pytest.mark.parametrize("name", ["truncated.png", "truncated.jpeg", "truncated.tiff", "no picture.png", "empty.png"])
def test_a_picture_cut_short_is_one_line(run, tmp_path, name):
    kind = name.split(".")[1].upper()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name, kind)
    half = (tmp_path / name).read_bytes()[: (tmp_path / name).stat().st_size // 2]
    (tmp_path / name).write_bytes({"no picture.png": b"no picture", "empty.png": b""}.get(name, half))
    assert_one_line(run(zero_shot, "--classes", "cat,dog", name), f"{name}: not a picture that can be decoded: ")


KEY = "visual_projection.weight"
DAMAGES = {
    "missing": (lambda arrays: arrays.pop(KEY), f"1 missing ({KEY})"),
    "of another shape": (lambda arrays: arrays.update({KEY: mx.zeros((12, 3))}), f"1 of another shape ({KEY} (12, 3)"),
    "unexpected": (lambda arrays: arrays.update(more=mx.zeros(1)), "1 unexpected (more)"),
}


@pytest.mark.parametrize("recipe", [zero_shot, evaluate_clip])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tensor_that_is_missing_or_of_another_shape_is_one_line(run, model, tmp_path, damage, recipe):
    shutil.copytree(model, tmp_path / "damaged")
    arrays = dict(mx.load(str(model / "model.safetensors")))
    act, message = DAMAGES[damage]
    act(arrays)
    mx.save_safetensors(str(tmp_path / "damaged" / "model.safetensors"), arrays)
    (tmp_path / "a.png").write_bytes(b"")
    two_halves().save(tmp_path / "a.png")
    flags = ["--classes", "cat,dog", "a.png"] if recipe is zero_shot else ["--run-dir", "judged"]
    assert_one_line(run(recipe, "--module", "damaged", *flags), message)
    assert not (tmp_path / "judged").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", 0.5, "model.safetensors is missing or damaged"),
        ("model.safetensors", b"12", "model.safetensors is missing or damaged"),
        ("model.safetensors", None, "has neither model.safetensors nor pytorch_model.bin"),
        ("config.json", b"{", "config.json cannot be read"),
        ("preprocessor_config.json", b"{", "preprocessor_config.json cannot be read"),
        ("preprocessor_config.json", None, "has no preprocessor_config.json"),
        ("tokenizer.json", None, "damaged holds no tokenizer"),
        ("tokenizer.json", b"{", "damaged holds no tokenizer"),
    ],
)
def test_a_file_of_a_model_that_is_damaged_or_missing_is_one_line(run, model, tmp_path, name, content, message):
    shutil.copytree(model, tmp_path / "damaged")
    path = tmp_path / "damaged" / name
    if content is None:
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == 0.5 else content)
    two_halves().save(tmp_path / "a.png")
    assert_one_line(run(zero_shot, "--module", "damaged", "--classes", "cat,dog", "a.png"), message)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"cat\ndog\ncat\n", "'cat' is repeated"),
        (b"cat\n\ndog\n", "class name 2 is empty"),
        (b"cat\n  \n", "class name 2 is empty"),
        (b"", "at least one class name"),
        (b"\xff\xfe\x00", "not a file of text in UTF-8"),
    ],
)
def test_a_class_list_that_is_no_list_of_different_names_is_one_line(run, tmp_path, names, message):
    two_halves().save(tmp_path / "a.png")
    (tmp_path / "names.txt").write_bytes(names)
    assert_one_line(run(zero_shot, "--classes", "names.txt", "a.png"), message)


@pytest.mark.parametrize("recipe", [zero_shot, evaluate_clip])
@pytest.mark.parametrize("templates", ["a photo", "", "a photo of a {", "best"])
def test_a_template_without_a_place_for_the_name_is_one_line(run, tmp_path, templates, recipe):
    two_halves().save(tmp_path / "a.png")
    flags = ["--classes", "cat,dog", "a.png"] if recipe is zero_shot else ["--run-dir", "judged"]
    result = run(recipe, "--templates", templates, *flags)
    assert_one_line(result, f"--templates {templates!r}: choose one of name, photo, imagenet-7, imagenet-80, or a")


def test_a_sentence_is_a_template_too(run, tmp_path):
    two_halves().save(tmp_path / "a.png")
    classes = ["--classes", "cat,dog,red circle", "a.png"]
    printed = [run(zero_shot, *classes, "--templates", templates)[1] for templates in ("name", "{}", "no {}")]
    assert printed[0] == printed[1] != printed[2] and len(printed[2]) == 1


def test_many_class_names_are_a_list_and_no_path(run, tmp_path):
    two_halves().save(tmp_path / "a.png")
    code, lines, _ = run(zero_shot, "--classes", ",".join(f"animal number {i}" for i in range(40)), "a.png")
    assert code == 0 and lines


@pytest.mark.parametrize(
    ("column", "message"), [("kinds", "there is no column 'kinds'"), ("tags", "must hold classes")]
)
def test_a_column_of_classes_that_is_none_is_refused_before_the_run(run, tmp_path, column, message):
    rows = {"image": [two_halves()] * 9, "caption": ["red"] * 9, "tags": [["a", "b"]] * 9}
    table = datasets.Dataset.from_dict(rows | {"split": ["train", "val", "test"] * 3})
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "rows.parquet"))
    source = ("--data.source", "rows.parquet", "--data.split-column", "split")
    code, _, errors = run(evaluate_clip, *source, "--class-column", column, "--run-dir", "judged")
    assert code == 2 and message in errors[-1] and not (tmp_path / "judged").exists()
