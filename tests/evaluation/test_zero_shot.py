"""ZeroShotClassifier: built once of class names, kept, saved, and asked by `recipes.zero_shot`."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from small_clip import SIGLIP, small_clip

from mlxmm import ZeroShotClassifier
from mlxmm.compute.layer_calls import replaced_calls
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.errors import UserError
from mlxmm.evaluation.prompt_templates import IMAGENET_7, IMAGENET_80, TEMPLATES

ROOT = Path(__file__).parents[2]
NAMES = ["cat", "dog", "red circle"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)) for _ in range(5)]


def passes_of_the_text_tower(clip, act) -> int:
    count = []
    with replaced_calls({"text": clip.network.text_model}, lambda name, call: lambda *a: count.append(1) or call(*a)):
        act()
    return len(count)


def test_the_80_templates_are_openais_and_the_seven_are_among_them():
    assert len(IMAGENET_80) == len(set(IMAGENET_80)) == 80 and set(IMAGENET_7) < set(IMAGENET_80)
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)
    # Of the 80 lines of the notebook, sorted.
    digest = hashlib.sha256("\n".join(sorted(IMAGENET_80)).encode()).hexdigest()
    assert digest == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"


def test_templates_are_averaged_in_embedding_space(pictures):
    clip = small_clip()
    classifier = ZeroShotClassifier.build(clip, NAMES, IMAGENET_7)
    for name, weights in zip(NAMES, np.array(classifier.weights)):
        vectors = [np.array(clip.encode_text(clip.tokenize([text.format(name)])))[0] for text in IMAGENET_7]
        mean = np.mean([vector / np.linalg.norm(vector) for vector in vectors], axis=0)
        np.testing.assert_allclose(weights, mean / np.linalg.norm(mean), atol=1e-5)
    features = np.array(clip.encode_image(clip.preprocess(pictures)))
    logits = np.exp(clip.network.logit_scale.item()) * features @ np.array(classifier.weights).T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(np.array(classifier.predict(pictures)), expected, atol=1e-5)


def test_the_text_tower_does_not_run_a_second_time(cache, pictures):
    clip, made = small_clip(), []
    make = lambda: made.append(ZeroShotClassifier.from_cache(clip, NAMES).predict(pictures))
    assert [passes_of_the_text_tower(clip, make) for _ in range(3)] == [1, 0, 0]
    assert mx.array_equal(made[0], made[1]) and mx.array_equal(made[0], made[2])


def test_other_weights_names_or_templates_are_another_classifier(cache):
    make = {
        "first": (small_clip(), NAMES, ["a {}."]),
        "names": (small_clip(), NAMES[::-1], ["a {}."]),
        "templates": (small_clip(), NAMES, ["the {}."]),
        "weights": (small_clip(seed=1), NAMES, ["a {}."]),
    }
    for clip, names, templates in make.values():
        again = lambda: ZeroShotClassifier.from_cache(clip, names, templates)  # noqa: B023
        assert passes_of_the_text_tower(clip, again) == 1
    assert len(list(cache.glob("zero-shot-*"))) == 4
    vision = small_clip()
    vision.network.visual_projection.weight = vision.network.visual_projection.weight * 2
    assert passes_of_the_text_tower(vision, lambda: ZeroShotClassifier.from_cache(vision, NAMES, ["a {}."])) == 0


def test_one_file_classifies_features_without_a_clip(tmp_path, pictures):
    clip = small_clip()
    built = ZeroShotClassifier.build(clip, [*NAMES, "schöne Katze"])
    built.save(tmp_path / "names.safetensors")
    loaded = ZeroShotClassifier.load(tmp_path / "names.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["names.safetensors"]
    assert loaded.class_names == (*NAMES, "schöne Katze")
    features = clip.encode_image(clip.preprocess(pictures))
    assert mx.allclose(loaded.classify(features), built.predict(pictures), atol=1e-6)
    with pytest.raises(UserError, match="without a CLIP"):
        loaded.predict(pictures)


def test_a_file_that_holds_no_classifier_is_refused(tmp_path):
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.zeros(2)})
    with pytest.raises(UserError, match="is not a classifier"):
        ZeroShotClassifier.load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        ZeroShotClassifier.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["cat", "cat"], ["{}"], "'cat' is repeated"),
        (["cat", " "], ["{}"], "class name 2 is empty"),
        ([], ["{}"], "at least one class name"),
        (["cat"], ["a photo"], "'a photo' has no {}"),
    ],
)
def test_bad_names_and_templates_are_refused(names, templates, message):
    with pytest.raises(UserError, match=message):
        ZeroShotClassifier.build(small_clip(), names, templates)


# ---- the recipes, as people run them


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("zero_shot")
    small_clip().save_pretrained(folder / "model")
    for i, picture in enumerate(pictures[:2]):
        picture.save(folder / f"{i}.png")
    (folder / "names.txt").write_text("cat\ndog\nred circle\n")
    (folder / "notes.png").write_text("not a picture")
    return folder


def run(recipe, *flags, folder):
    environment = os.environ | {
        "MLXMM_CACHE": str(folder / "cache"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", f"recipes.{recipe}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)


def test_the_recipe_prints_a_line_for_each_picture_and_keeps_the_classifier(folder):
    outputs = []
    for classes in ("cat,dog,red circle", "names.txt"):
        done = run("zero_shot", "--classes", classes, "--module", "model", "0.png", "1.png", folder=folder)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
        kept = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.safetensors")}
        assert len(kept) == 1
    assert outputs[0] == outputs[1] and [line.split()[0] for line in outputs[0].splitlines()] == ["0.png", "1.png"]
    for line in outputs[0].splitlines():
        chances = [float(word) for word in line.split()[1:] if word[0].isdigit()]
        assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1, abs=2e-4)
    assert {path.name for path in folder.iterdir()} == {"model", "cache", "0.png", "1.png", "names.txt", "notes.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "cat,cat", "0.png"], "'cat' is repeated"),
        (["--classes", "cat,,dog", "0.png"], "class name 2 is empty"),
        (["--classes", "cat,dog"], "at least one picture"),
        (["0.png"], "--classes wants"),
        (["--classes", "nowhere.txt", "0.png"], "there is no such file"),
        (["--classes", "cat,dog", "notes.png"], "notes.png: not a picture"),
        (["--classes", "cat,dog", "nowhere.png"], "nowhere.png: not a picture"),
        (["--classes", "cat,dog", "--templates", "best", "0.png"], "--templates 'best': choose one of name, photo, "),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(flags, message, folder, monkeypatch, capsys):
    from mlxmm.cli import run_recipe
    from mlxmm.config import Preset
    from recipes import zero_shot

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["zero_shot", "--module", "model", *flags])
    with pytest.raises(SystemExit) as stopped:
        run_recipe("zero_shot", zero_shot.main, {"default": Preset("", zero_shot.Config())})
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def test_the_first_picture_of_each_class_of_a_column_is_classified_by_first_captions(tmp_path, pictures, cache):
    import datasets

    from recipes import evaluate_clip

    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    rows = {
        "image": [str(tmp_path / f"{i % 5}.png") for i in range(15)],
        "caption": [[f"thing {i}", "a thing"] for i in range(15)],
        "kind": ["a", "b", "b", "c", "a"] * 3,
        "split": ["train"] * 5 + ["val"] * 5 + ["test"] * 5,
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "rows.parquet")
    data = open_source(CaptionDataConfig(source=str(tmp_path / "rows.parquet"), split_column="split"), 0)
    clip, config = small_clip(), evaluate_clip.Config(data=data.config, class_column="kind", templates="a {}")
    metrics = evaluate_clip.evaluate(config, clip, data)
    names = ["thing 10", "thing 11", "thing 13"]  # of the classes a, b, c of the test split
    first = data.rows["test"].first_of_each("kind")
    assert [first[i]["captions"][0] for i in range(len(first))] == names
    expected = ZeroShotClassifier.build(clip, names, ["a {}"]).top_k([pictures[i] for i in (0, 1, 3)], names)
    assert {name: metrics[f"zero_shot/{name}"] for name in expected} == expected
    assert expected["top1_chance"] == pytest.approx(1 / 3)
    assert metrics["retrieval/image_to_text/recall_at_1_chance"] == pytest.approx(1 / 3)  # 2 of 6 texts, 5 pictures
    with pytest.raises(UserError, match="there is no column 'sort'; the columns are .*kind, split"):
        evaluate_clip.evaluate(evaluate_clip.Config(data=data.config, class_column="sort"), clip, data)


def test_a_clip_is_judged_with_chance_beside_each_figure(folder):
    shapes = ["--data.shapes.num-test", "12", "--data.shapes.image-size", "16"]
    done = run("evaluate_clip", "--module", "model", "--run-dir", "judged", *shapes, folder=folder)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "judged/summary.json").read_text())
    for name in ("zero_shot/accuracy", "retrieval/image_to_text/recall_at_1", "retrieval/text_to_image/median_rank"):
        assert f"{name}_chance" in metrics
        line = next(line for line in done.stdout.splitlines() if line.startswith(name + " "))
        assert line.split()[1:] == [f"{metrics[name]:.4f}", f"{metrics[name + '_chance']:.4f}"]
    assert metrics["zero_shot/accuracy_chance"] == pytest.approx(1 / 40)
    assert "zero_shot/pairs" in metrics and "zero_shot/pairs_unseen" in metrics


def test_training_ends_with_zero_shot_and_retrieval_metrics(folder):
    sizes = ["--data.shapes.num-train", "32", "--data.shapes.num-val", "8", "--data.shapes.num-test", "16"]
    steps = ["--data.batch-size", "8", "--trainer.max-steps", "2", "--module.chunk-size", "4"]
    more = ["--module.patch-dropout", "0.5", "--trainer.no-compile"]
    done = run("train_clip", *sizes, *steps, *more, "--run-dir", "trained", folder=folder)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "trained/summary.json").read_text())
    names = ("accuracy", "pairs", "pairs_unseen", "pairs_unseen_attributes")
    wanted = [*(f"zero_shot/{name}" for name in names), "retrieval/text_to_image/recall_at_1"]
    assert all(0 < metrics[f"{name}_chance"] < 1 and 0 <= metrics[name] <= 1 for name in wanted)
    assert all(f"{name} " in done.stdout for name in wanted)


@pytest.mark.slow
def test_a_column_of_classes_is_classified_and_probed(folder):
    pytest.importorskip("sklearn")
    import datasets

    names = ["cat", "dog"]
    columns = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "split": datasets.Value("string")}
    )
    rows = {
        "image": [str(folder / f"{i % 2}.png") for i in range(12)],
        "label": [i % 2 for i in range(12)],
        "split": ["train"] * 4 + ["val"] * 4 + ["test"] * 4,
    }
    datasets.Dataset.from_dict(rows, features=columns).to_parquet(folder / "rows.parquet")
    source = ["--data.source", "rows.parquet", "--data.split-column", "split", "--data.caption-column", "label"]
    done = run(
        "evaluate_clip", "--module", "model", "--labels", "--probe", *source, "--run-dir", "labels", folder=folder
    )
    (folder / "rows.parquet").unlink()
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "labels/summary.json").read_text())
    assert metrics["linear_probe/accuracy"] == 1  # two pictures, each its own class
    assert metrics["zero_shot/top1_chance"] == 0.5 and metrics["zero_shot/top1"] in (0, 0.5, 1)


def test_a_siglip_gives_each_class_its_sigmoid_and_a_softmax_by_choice(pictures, tmp_path):
    clip = small_clip(**SIGLIP)
    classifier = ZeroShotClassifier.build(clip, ["cat", "dog"], TEMPLATES["name"])
    logits = clip(clip.preprocess(pictures), clip.tokenize(["cat", "dog"]))
    assert mx.allclose(classifier.predict(pictures), mx.sigmoid(logits), atol=1e-6)
    assert mx.allclose(classifier.predict(pictures, softmax=True), mx.softmax(logits, axis=-1), atol=1e-6)
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = ZeroShotClassifier.load(tmp_path / "classifier.safetensors", clip)
    assert mx.array_equal(loaded.predict(pictures), classifier.predict(pictures))
    softmax = ZeroShotClassifier.build(small_clip(), ["cat", "dog"]).predict(pictures)
    assert mx.allclose(softmax.sum(axis=-1), mx.ones(len(pictures)))


def test_a_label_that_is_no_class_is_one_line(pictures):
    classifier = ZeroShotClassifier.build(small_clip(), ["cat", "dog"])
    with pytest.raises(UserError, match="'cow' is none of the 2 classes; 1 labels are not"):
        classifier.top_k(pictures[:2], ["cat", "cow"])
