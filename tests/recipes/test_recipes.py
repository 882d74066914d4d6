"""Recipes as people run them: a process of their own, a folder of their own."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlxmm.storage import checkpoint

ROOT = Path(__file__).parents[2]
TINY = ["--preset", "tiny"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(recipe, *flags, cache, cwd=ROOT):
    environment = os.environ | {"MLXMM_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"recipes.{recipe}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=240)


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = run("align_qwen3", *TINY, "--run-dir", folder, cache=cache)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_behind_what_the_readme_says(finished):
    folder, output = finished
    length = "4 updates (--max-steps is for the captioner)"
    assert f"4 parts to do: tower, language model, captioner, test\n1 of 4: training the tower, {length}\n" in output
    assert re.search(r"^tower: trained in \d+ s, val/accuracy [\d.]+, zero_shot/accuracy [\d.]+$", output, re.MULTILINE)
    assert re.search(r"^captioner: trained in \d+ s, val/loss [\d.]+\n4 of 4: captioning", output, re.MULTILINE)
    summary = json.loads((folder / "summary.json").read_text())
    assert {"test/exact_match", "test/exact_match_unseen", "test/exact_match_unseen_attributes"} <= set(summary)
    assert {"test/exact_match_shuffled", "test/bleu", "zero_shot/accuracy", "seconds", "val/loss"} <= set(summary)
    assert (folder / "samples.png").stat().st_size > 1_000
    assert json.loads((folder / "config.json").read_text())["trainer"]["max_steps"] == 8
    assert "tensorboard --logdir" in output and str(folder / "samples.png") in output
    assert not list(folder.rglob(".tmp-*"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "val/loss_shuffled" in row] == [4, 8]


def test_the_commands_at_the_end_work_as_they_stand(finished, cache):
    _, _, told = finished[1].partition("next:\n")
    commands = {line[2:18].strip(): line[18:] for line in told.splitlines()}
    assert list(commands) == [
        "caption",
        "evaluate",
        "try it",
        "your pictures",
        "train on yours",
        "upload",
        "see the curves",
    ]
    assert commands["evaluate"].endswith("--data.shapes.num-train 64 --data.shapes.num-val 16 --data.shapes.num-test 8")
    environment = os.environ | {"MLXMM_CACHE": str(cache)}
    done = subprocess.run(commands["caption"], shell=True, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "example.png: " in done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_goes_on_to_its_end(finished, cache, tmp_path):
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "recipes.align_qwen3", *TINY, "--run-dir", str(tmp_path / "run")]
    environment = os.environ | {"MLXMM_CACHE": str(cache)}
    child = subprocess.Popen(command, stdout=writer, stderr=writer, cwd=ROOT, env=environment)
    os.close(writer)
    assert os.read(reader, 100).startswith(b"run: ")
    os.close(reader)  # as `| head -1` does
    assert child.wait(120) == 0
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (finished[0], tmp_path / "run"))
    assert first | {"seconds": 0} == second | {"seconds": 0} and (tmp_path / "run/samples.png").exists()


@pytest.mark.parametrize("recipe", ["train_clip", pytest.param("align_qwen3", marks=pytest.mark.slow)])
def test_fast_dev_run_leaves_no_files_and_points_to_none(recipe, tmp_path):
    flags = ["--preset", "tiny", "--trainer.fast-dev-run", 1]
    environment = os.environ | {"MLXMM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/mlx").symlink_to(Path(tempfile.gettempdir()) / "mlx")  # kernels are not compiled again
    command = [sys.executable, "-m", f"recipes.{recipe}", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp", "mlx"]
    assert done.stdout.endswith("fast_dev_run: everything ran, and no files were written\n")
    assert not re.search(r"tensorboard|samples\.png|^run: |summary", done.stdout, re.MULTILINE)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("align_qwen3", *TINY, "--run-dir", tmp_path / "run", cache=tmp_path / "file" / "cache")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "cannot be written: Not a directory" in done.stderr


def test_tensorboard_reads_scalars_images_text_and_settings(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(finished[0]))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "val/loss", "vitals/lr", "vitals/memory/peak_mib"} <= set(tags["scalars"])
    assert "vitals/throughput/examples_per_second" in tags["scalars"]
    assert [event.step for event in events.Scalars("val/loss")] == [4, 8]
    trainable = [event.value for event in events.Scalars("vitals/schedule/num_trainable")]
    assert trainable[0] == trainable[1] < trainable[2] == trainable[3]  # the last layers from step 4 on
    assert set(tags["images"]) == {"val/samples", "test/samples"}
    assert {"val/samples/text_summary", "vitals/schedule/trainable/text_summary"} <= set(tags["tensors"])
    summary = json.loads((finished[0] / "summary.json").read_text())
    [bleu] = events.Scalars("test/bleu")
    assert bleu.step == 8 and bleu.value == pytest.approx(summary["test/bleu"])
    table = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert table.session_start_info.hparams["module.optimizer.learning_rate"].number_value == 5e-3
    assert table.session_start_info.hparams["data.source"].string_value == "shapes"


def test_tensorboard_reads_what_a_clip_takes_for_similar_and_which_objects_it_confuses(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tower"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"val/similarity", "val/zero_shot/confusion"}
    assert {"test/zero_shot/accuracy", "val/zero_shot/top1"} <= set(tags["scalars"])
    assert not [tag for tag in tags["scalars"] if tag.startswith("test/") and tag.endswith("_chance")]


def test_frozen_parts_stay_and_exactly_the_opened_layers_change(finished, cache):
    weights = checkpoint.load(finished[0] / "checkpoints/last")["weights"]
    (tower,), (lm,) = cache.glob("tower-*"), cache.glob("language-model-*")
    before = mx.load(str(lm / "model.safetensors"))
    changed = {name for name in before if not mx.array_equal(weights[f"language_model.{name}"], before[name])}
    assert changed == {name for name in before if name.startswith(("model.layers.2.", "model.layers.3."))}
    from mlxmm.networks.clip import from_hub

    seen = from_hub(mx.load(str(tower / "model.safetensors")))
    vision = {name.removeprefix("vision_model."): a for name, a in seen.items() if name.startswith("vision_model.")}
    assert vision and all(mx.array_equal(weights[f"vision.{name}"], array) for name, array in vision.items())


@pytest.mark.slow
def test_a_second_run_takes_tower_and_language_model_from_the_cache(finished, cache, tmp_path):
    done = run("align_qwen3", *TINY, "--run-dir", tmp_path / "two", cache=cache)
    assert done.returncode == 0 and not (tmp_path / "two" / "tower").exists()
    first, second = (json.loads((f / "summary.json").read_text()) for f in (finished[0], tmp_path / "two"))
    assert first | {"seconds": 0} == second | {"seconds": 0}


@pytest.mark.slow
def test_a_run_cut_short_and_resumed_ends_as_the_whole_one(finished, cache, tmp_path):
    folder = tmp_path / "cut"
    assert run("align_qwen3", *TINY, "--run-dir", folder, "--trainer.max-steps", 5, cache=cache).returncode == 0
    done = run("align_qwen3", "--run-dir", folder, "--resume", "last", "--trainer.max-steps", 8, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "1 of 4: the tower was trained earlier, val/accuracy" in done.stdout
    assert "3 of 4: training the captioner, 8 updates, from step 5\n" in done.stdout
    # The rate falls to its end at max_steps, so the longer run is another one: only its length is compared.
    assert json.loads((folder / "checkpoints/last/state.json").read_text())["global_step"] == 8


@pytest.mark.slow
def test_a_run_killed_while_it_captions_keeps_its_summary_and_resumed_ends_as_the_whole_one(tmp_path):
    cache = tmp_path / "cache"
    flags = [*TINY, "--data.shapes.num-test", 300, "--run-dir"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert run("align_qwen3", *flags, whole, cache=cache).returncode == 0
    environment = os.environ | {"MLXMM_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "recipes.align_qwen3", *map(str, flags), str(folder)]
    child = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (folder / "summary.json").exists() and child.poll() is None:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    summary = json.loads((folder / "summary.json").read_text())
    assert "val/loss" in summary and not {"seconds", "test/exact_match"} & set(summary)
    assert run("align_qwen3", "--run-dir", folder, "--resume", "last", cache=cache).returncode == 0
    first, second = (json.loads((each / "summary.json").read_text()) for each in (whole, folder))
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_a_trained_run_captions_pictures(finished):
    from mlxmm import Qwen3Aligner
    from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar

    aligner = Qwen3Aligner.from_pretrained(finished[0] / "checkpoints/last")
    rows = ShapesGrammar(ShapesConfig(), 0).rows(0)["test"]
    images = [rows[i]["image"] for i in range(3)]
    together = aligner.caption(images)
    assert together == [aligner.caption([image])[0] for image in images]


def test_a_trained_run_is_judged_with_one_caption_a_picture_and_a_control(finished, cache, tmp_path):
    module, folder = finished[0] / "checkpoints/last", tmp_path / "judged"
    flags = ["--module", module, "--run-dir", folder, "--data.shapes.num-test", 8, "--generation.num-beams", 2]
    done = run("evaluate_captions", *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 == len({row["id"] for row in rows}) and all(len(row["references"]) > 1 for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    names = {"bleu_1", "bleu_4", "rouge_l", "cider_d", "exact_match", "perplexity"}
    assert names | {f"{name}_shuffled" for name in names} | {"distinct_1", "distinct_2"} <= set(summary)
    assert summary["pictures"] == 8 and summary["perplexity"] > 1
    assert summary["cider_d"] == pytest.approx(sum(row["cider_d"] for row in rows) / 8)


def test_a_clip_whose_context_the_prompt_fills_is_refused(finished, cache, tmp_path):
    (tower,) = cache.glob("tower-*")
    flags = ["--module", finished[0] / "checkpoints/last", "--clip", tower, "--data.shapes.num-test", 8]
    done = run("evaluate_captions", *flags, "--run-dir", tmp_path / "judged", cache=cache)
    assert done.returncode == 2 and "texts do not fit after 'A photo depicts '" in done.stderr
    assert not (tmp_path / "judged").exists()


def test_pictures_are_captioned_by_file_and_folder(finished, cache, tmp_path):
    from PIL import Image

    from mlxmm import Qwen3Aligner

    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{i}.png")
    (tmp_path / "2.jpg").write_text("no picture")
    module, table = finished[0], tmp_path / "captions.csv"
    done = run("caption", "--module", module, tmp_path, tmp_path / "1.png", "--to", table, cache=cache)
    assert done.returncode == 0, done.stderr
    aligner = Qwen3Aligner.from_pretrained(module / "checkpoints/best")
    said = [aligner.caption([Image.open(tmp_path / f"{i}.png")])[0] for i in (0, 1, 1)]
    lines = [f"{tmp_path / name}: {text}" for name, text in zip(("0.png", "1.png", "1.png"), said)]
    assert done.stdout.splitlines() == lines and "2.jpg: not a picture" in done.stderr
    with table.open() as file:
        assert list(csv.DictReader(file)) == [
            {"file_name": name, "caption": text} for name, text in zip(("0.png", "1.png"), said)
        ]
    again = run("caption", "--module", module, tmp_path, "--to", table, cache=cache)
    assert again.returncode == 2 and "captions.csv exists: name another file" in again.stderr
    none = run("caption", "--module", module, tmp_path / "2.jpg", cache=cache)
    assert none.returncode == 2 and none.stderr.endswith("error: none of these could be captioned\n")
    assert "nowhere.png is not there" in run("caption", "--module", module, "nowhere.png", cache=cache).stderr


def test_a_captioner_is_trained_over_the_same_tower_and_captions_pictures(finished, cache, tmp_path):
    sizes = ["--max-steps", 6, "--trainer.val-check-interval", 3, "--module.decoder.reading", "prefix"]
    towers = set(cache.glob("tower-*"))
    done = run("train_captioner", *TINY, *sizes, "--run-dir", tmp_path / "c", cache=cache)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert {"test/exact_match", "test/exact_match_shuffled", "val/loss_shuffled", "zero_shot/accuracy"} <= set(summary)
    assert set(cache.glob("tower-*")) == towers  # that of align_qwen3 serves
    finished_image = tmp_path / "c" / "samples.png"
    said = run("caption", "--module", tmp_path / "c/checkpoints/last", finished_image, cache=cache)
    assert said.returncode == 0 and "samples.png" in said.stdout
    job = ["--captioner.model", tmp_path / "c/checkpoints/last", "--data.shapes.num-train", 4]
    written = run("write_captions", *job, "--run-dir", tmp_path / "w", cache=cache)  # asked what it was trained with
    assert written.returncode == 0, written.stderr
    assert "4 pictures of train, 4 captions" in written.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.source", "nowhere.parquet"], "is not there"),
        (["--data.sauce", "shapes"], "Unrecognized options: --data.sauce"),
        (["--trainer.max-steps", "many"], "--trainer.max-steps"),
        (["--trainer.max-steps", "-7"], "'max_steps' must be >= -1: -7"),
        (["--preset", "flickr"], "choose one of default, tiny, flickr30k"),
        (["--resume", "last"], "there is no run"),
        (["--resume", "nowhere"], "no checkpoint is there"),
        (["--module.vision", "nowhere/at/all"], "is not there"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(flags, message, cache, tmp_path):
    done = run("align_qwen3", *flags, "--run-dir", tmp_path / "bad", cache=cache, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "bad" / "checkpoints").exists()
    assert not (tmp_path / "bad").exists()


def test_a_run_directory_that_exists_is_not_touched(finished, cache):
    before = {path: path.stat().st_mtime for path in finished[0].rglob("*")}
    done = run("align_qwen3", *TINY, "--run-dir", finished[0], cache=cache)
    assert done.returncode == 2 and "exists" in done.stderr
    assert before == {path: path.stat().st_mtime for path in finished[0].rglob("*")}


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(finished, cache, tmp_path):
    last = finished[0] / "checkpoints/last"
    flags = [*TINY, "--run-dir", tmp_path / "other", "--module.projector", "linear", "--resume", last]
    done = run("align_qwen3", *flags, cache=cache)
    assert done.returncode == 2 and "holds another model than Qwen3Aligner" in done.stderr
