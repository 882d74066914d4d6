"""`--refresh.…`: new captions while a recipe trains, from its flags alone."""

import importlib
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from local_hub import LocalHub
from small_modules import small_aligner, small_clip

from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.filters import FilterConfig
from mlxmm.captioners.own_child_writer import OwnChildWriter
from mlxmm.captioners.own_writer import OwnWriter
from mlxmm.cli import parse_config
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar
from mlxmm.errors import UserError
from mlxmm.networks.language_model import with_dtype
from mlxmm.storage.runs import Run
from recipes.parts.refresh import open_refresh
from recipes.parts.refresh_config import RefreshCaptionerConfig, RefreshConfig
from recipes.parts.refresh_judge import RefreshPusher

ROOT = Path(__file__).parents[2]
ROWS = ShapesGrammar(ShapesConfig(image_size=16, num_train=24, num_val=8, num_test=8), 0).rows(0)
CLIP = ["--preset", "tiny", "--refresh.captioner.model"]


def main(recipe: str, *flags) -> None:
    module = importlib.import_module(f"recipes.{recipe}")
    module.main(parse_config(recipe, module.PRESETS, [*map(str, flags)]))


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    module, folder = small_aligner(), tmp_path_factory.mktemp("captioner") / "captioner"
    module.vision_config = {"model_type": "clip_vision_model", **attrs.asdict(module.vision.config)}
    module.lm_config = with_dtype(module.lm_config, module.language_model)
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--refresh.every-n-epochs 2", "--refresh.captioner.model is missing"),
        ("--refresh.captioner.url http://localhost:1/v1", "--refresh.captioner.model is missing"),
        ("--refresh.captioner.model itself", "itself: a CLIP writes no captions"),
        ("--refresh.captioner.model shapes --refresh.source pictures", "knows the drawn pictures of training alone"),
        ("--refresh.captioner.model shapes --data.source x.parquet", "knows the drawn pictures of training alone"),
        ("--refresh.captioner.model x --refresh.source shapes", "drawn pictures have captions already"),
        ("--refresh.captioner.model x --refresh.every-n-epochs 1 --refresh.every-n-train-steps 9", "set one of them"),
        ("--refresh.captioner.model x --refresh.weight 1.5", "--refresh.weight above 1 needs more pictures"),
        ("--refresh.captioner.model x --refresh.source y --max-steps -1", "say how long to train with --max-steps"),
        ("--refresh.captioner.model x --data.source y --data.streaming", "does not go with --data.streaming"),
        ("--refresh.captioner.model x --refresh.public", "--refresh.push-to is missing"),
        ("--refresh.captioner.model x --refresh.prompts nope", "there is no prompt 'nope'"),
        ("--refresh.captioner.model x --refresh.push-to nowhere", "'nowhere' is not a repository name"),
        (
            "--refresh.captioner.model x --refresh.push-to a/b --refresh.config-name dropped",
            "cannot be called 'dropped'",
        ),
        ("--refresh.captioner.model /nowhere", "/nowhere is not there"),
        ("--refresh.captioner.model shapes --refresh.filters.clip /nowhere", "/nowhere is not there"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line_before_anything_is_done(flags, line, tmp_path):
    with pytest.raises(UserError) as error:
        main("train_clip", "--preset", "tiny", *flags.split(), "--run-dir", tmp_path / "run")
    assert line in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_what_a_captioner_in_training_cannot_do_is_refused_too(tmp_path):
    cases = {
        "--refresh.captioner.model itself --refresh.captioner.url http://localhost:1/v1": "servers do not write by",
        "--refresh.captioner.model itself --trainer.strategy fsdp": "does not write with strategy fsdp",
        "--refresh.captioner.model itself --refresh.source y --cached-features": "whose features cannot be cached",
    }
    for flags, line in cases.items():
        with pytest.raises(UserError, match=line):
            main("train_captioner", "--preset", "tiny", *flags.split(), "--run-dir", tmp_path / "run")


def test_a_captioner_in_a_child_process_writes_what_it_writes_in_this_one(captioner):
    images = [ROWS["train"][place]["image"] for place in range(5)]
    sampling = Sampling(temperature=1.0, max_tokens=4, seed=3)
    child, own = OwnChildWriter(str(captioner), batch_size=2), OwnWriter.from_pretrained(captioner)
    try:
        written = child.write(images, [""] * 5, sampling)
    finally:
        child.close()
    assert child.revision == own.revision
    expected = own.write(images, [""] * 5, sampling)
    assert [(one.text, one.num_tokens, one.finish_reason) for one in written] == [
        (one.text, one.num_tokens, one.finish_reason) for one in expected
    ]


def test_unlabelled_pictures_are_captioned_filtered_and_trained_on_and_those_of_test_never(captioner, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        ROWS["train"][number]["image"].save(tmp_path / "pictures" / f"{number:02}.png")
    ROWS["test"][3]["image"].save(tmp_path / "pictures" / "held-out.png")
    small_clip().save_pretrained(tmp_path / "clip")
    config = RefreshConfig(
        captioner=RefreshCaptionerConfig(model=str(captioner)),
        source=str(tmp_path / "pictures"),
        sampling=Sampling(temperature=1.0, max_tokens=2),
        filters=FilterConfig(clip=str(tmp_path / "clip"), clip_prompt="", keep_fraction=0.75),
    )
    shapes = ShapesConfig(image_size=16, num_train=16, num_val=8, num_test=8)
    source = open_source(CaptionDataConfig(shapes=shapes), 0)
    run = Run(tmp_path)
    make_rows = open_refresh(config, source, run, small_clip(), RefreshPusher(config, tmp_path))
    try:
        lengths = [len(make_rows(0)), len(make_rows(1)), make_rows.wait() or len(make_rows(2))]
        make_rows.wait()
        make_rows(3)
    finally:
        make_rows.close()
    assert lengths == [16, 16, 24]  # half as many as there are in training
    assert "without new captions, as val or test has them too: 1 picture\n" in capsys.readouterr().out
    versions = [make_rows.folder.read(version) for version in (1, 2)]
    for values in versions:
        metrics = values["metrics"]
        assert metrics["made"] == 24 and 0 < metrics["dropped_best"] < 12
        assert metrics["kept"] == 24 - metrics["dropped_best"] - metrics["dropped_empty"] == len(values["captions"])
    assert "clip_score_before" not in versions[0]["metrics"]  # they had no captions
    scores = versions[1]["metrics"]["clip_score_before"], versions[0]["metrics"]["clip_score_after"]
    assert all(0 <= score <= 2.5 for score in scores)
    assert make_rows.metrics["refresh/clip_score_before"] == scores[0]
    lineage = make_rows.lineage()
    assert [one["rows"]["train"] for one in lineage] == [len(values["captions"]) for values in versions]
    assert {one["captioners"][0]["captioner"] for one in lineage} == {captioner.name}
    assert lineage[0]["filters"]["best"] == versions[0]["metrics"]["dropped_best"]


PUSHES = """
import os, sys
from mlxmm import Module
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.storage.runs import Run
from pathlib import Path
from recipes.parts.refresh import refreshing
from recipes.parts.refresh_config import RefreshCaptionerConfig, RefreshConfig
source = open_source(CaptionDataConfig(shapes=ShapesConfig(image_size=16, num_train=8, num_val=8, num_test=8)), 0)
config = RefreshConfig(captioner=RefreshCaptionerConfig(model="shapes"), push_to="someone/captions")
for token, epochs in (("hf_read", 3), ("hf_write", 4)):
    os.environ["HF_TOKEN"] = token
    with refreshing(config, source, Run(Path(sys.argv[1])), Module()) as [callback]:
        for epoch in range(epochs):
            rows = callback.make_rows(epoch)
            callback.make_rows.wait()
    print("trained on", len(rows), flush=True)
"""


def test_each_refresh_is_pushed_under_a_name_of_its_own_and_one_that_fails_stops_nothing(tmp_path):
    (tmp_path / "hub").mkdir()
    with LocalHub(tmp_path / "hub") as hub:
        hub.tokens = {"hf_read": ("someone", "read"), "hf_write": ("someone", "write")}
        environment = hub.environment(tmp_path / "home") | {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PUSHES, str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        refused, pushed = done.stdout.split("trained on 8\n", 1)
        assert "refresh-1 was not pushed, training goes on: not pushed to someone/captions: the token may" in refused
        assert pushed.count("pushed: ") == len(hub.commits["someone/captions"]) == 3  # 1 and 2 now, and 3
        assert hub.is_private["someone/captions"]
    versions = [path.parent.name for path in (tmp_path / "run/refresh").glob("version-*/pushed.json")]
    assert sorted(versions) == ["version-1", "version-2", "version-3"]
