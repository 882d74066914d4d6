"""Lineage: what a run was trained on is in its checkpoints, and a run is resumed on the same data only."""

import re

import attrs
import datasets
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_clip import small_clip
from small_sources import png, sha256, three_splits, write_source

from callbacks import ModelCheckpoint, SyntheticRefresh
from mlxmm import Trainer, TrainerConfig
from mlxmm.compute.deterministic import repeats_to_the_bit
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.errors import UserError
from mlxmm.export.dataset import CaptionRecord, PictureRecord, write_dataset
from mlxmm.export.dataset_card import CardFacts
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.storage import checkpoint
from mlxmm.storage.lineage import Lineage, filters_in_card
from recipes import train_captioner

QWEN, OWN = "Qwen/Qwen2.5-VL-3B-Instruct", "mine"


@pytest.fixture(autouse=True)
def own_cache_of_datasets(tmp_path_factory, monkeypatch):
    """`datasets` finds what it cached of a folder by the folder's name alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def caption(text: str, captioner: str, score: float) -> CaptionRecord:
    facts = {"prompt": "short", "num_tokens": 4, "finish_reason": "stop", "created_at": 0.0, "sampling": {"seed": 0}}
    return CaptionRecord(text=text, captioner=captioner, captioner_revision="abc", clip_score=score, **facts)


@pytest.fixture
def caption_set(tmp_path):
    """A data set of captions with pictures: 20 rows of two captions, by two captioners."""
    rows = (
        PictureRecord(
            sha256=sha256(i),
            width=20,
            height=16,
            source="alice/pictures",
            source_split="train",
            row_id=str(i),
            captions=[caption(f"a cat {i}", QWEN, 0.9), caption(f"a dog {i}", OWN, i / 20)],
            image=png(i),
        )
        for i in range(200, 220)
    )
    counts = {"captions": 44, "kept": 40, "refusal": 4, "min_words": 0}
    write_dataset(tmp_path / "set", rows, CardFacts(counts=counts), include_images=True)
    return tmp_path / "set"


@pytest.fixture
def pictures(tmp_path):
    return write_source(tmp_path / "pictures.parquet", range(28), "a red circle", split=three_splits(20, 4))


def opened(*sources, **settings) -> CaptionSource:
    named = {"source": tuple(map(str, sources)), "split_column": "split", "batch_size": 5}
    return open_source(CaptionDataConfig(**(named | settings)), 0)


def test_lineage_names_captioners_versions_filters_rows_and_conditions(pictures, caption_set):
    first, second = opened(pictures, caption_set / "default", where=("clip_score>=0.6",), weights=(1, 0.5)).lineage
    assert first["source"] == pictures and first["rows"] == {"train": 20, "val": 4, "test": 4}
    assert first["captioners"] == [] and first["filters"] == first["where"] == {} and first["weight"] == 1
    assert second["rows"] == {"train": 20} and second["weight"] == 0.5 and second["where"] == {"clip_score>=0.6": 0}
    both = [{"captioner": name, "revision": "abc", "quantization": None, "captions": 20} for name in (QWEN, OWN)]
    assert sorted(second["captioners"], key=str) == sorted(both, key=str)
    assert second["filters"] == {"refusal": 4, "min_words": 0}
    alone = opened(pictures, caption_set / "default", where=("captioner==mine",)).lineage[1]
    assert alone["captioners"] == both[1:] and alone["fingerprint"] != second["fingerprint"]
    assert opened(pictures, caption_set).lineage[1]["filters"] == second["filters"]  # whose card is its own


def test_a_fingerprint_is_of_pictures_and_captions_wherever_they_lie(tmp_path, pictures):
    same = write_source(tmp_path / "elsewhere.parquet", range(28), "a red circle", split=three_splits(20, 4))
    other = write_source(tmp_path / "other.parquet", range(28), "a red square", split=three_splits(20, 4))
    moved = write_source(tmp_path / "moved.parquet", [99, *range(1, 28)], "a red circle", split=three_splits(20, 4))
    prints = [opened(source).lineage[0]["fingerprint"] for source in (pictures, same, other, moved)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_pictures_in_files_are_known_again_in_another_folder(tmp_path):
    lines = "".join(f'{{"file_name": "{i}.png", "caption": "a thing {i}"}}\n' for i in range(40))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.jsonl").write_text(lines)
        for i in range(40):
            (tmp_path / name / f"{i}.png").write_bytes(png(i))
    one, two = (opened(tmp_path / name, split_column=None).lineage[0] for name in ("one", "two"))
    assert one["fingerprint"] == two["fingerprint"]


def test_a_stream_is_known_by_the_names_and_sizes_of_its_files(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # for a bug of Arrow's at exit
    before = opened(pictures, streaming=True).lineage[0]
    assert before["rows"] == {"train": None, "val": 4, "test": 4}
    write_source(tmp_path / "pictures.parquet", range(30), "a red circle", split=three_splits(20, 5))
    assert opened(pictures, streaming=True).lineage[0]["fingerprint"] != before["fingerprint"]


def test_filters_are_read_from_the_section_of_their_configuration():
    table = "### Filters\n\nWords.\n\n| filter | captions it dropped |\n| --- | --- |\n| {} | {} |\n\n### Samples\n"
    card = "".join(
        f"## Configuration `{name}`\n\n{table.format(name, n)}\n| x | 3 |\n" for name, n in [("a", 1), ("b", 2)]
    )
    assert filters_in_card(card, "a") == {"a": 1} and filters_in_card(card, "b") == {"b": 2}
    assert filters_in_card(card, "c") == filters_in_card("", "a") == {}


# ---- resuming


def fit(data: CaptionData, folder, *callbacks, max_steps=9, ckpt_path=None, clip=None):
    clip = clip or small_clip()
    data.transform = clip.transform
    keep = ModelCheckpoint(every_n_train_steps=4, save_top_k=-1, monitor="train/loss", background=False)
    trainer = Trainer(
        max_steps=max_steps,
        default_root_dir=folder,
        log_every_n_steps=1,
        callbacks=[*callbacks, keep],
        enable_model_summary=False,
        enable_progress_bar=False,
        deterministic=not repeats_to_the_bit(mx.default_device(), deterministic=False),
    )
    trainer.fit(clip, data, ckpt_path=ckpt_path)
    return {name: np.array(array) for name, array in tree_flatten(clip.parameters())}


def data_of(*sources, **settings) -> CaptionData:
    return CaptionData(opened(*sources, **settings), transform=lambda row, caption: {})


@pytest.mark.parametrize("refreshed", [False, True])
def test_a_run_on_a_mixture_that_is_resumed_ends_as_one_never_stopped(tmp_path, pictures, caption_set, refreshed):
    def data():
        first = "shapes" if refreshed else pictures
        shapes = ShapesConfig(image_size=16, num_train=20, num_val=4, num_test=4)
        return data_of(first, caption_set / "default", weights=(1, 0.5), shapes=shapes)

    def callbacks(data):
        return [SyntheticRefresh(data.source.fresh_rows)] if refreshed else []

    whole = fit(one := data(), tmp_path / "whole", *callbacks(one))
    for step in (4, 8):
        start = tmp_path / "whole" / "checkpoints" / f"step={step}"
        resumed = fit(one := data(), tmp_path / str(step), *callbacks(one), ckpt_path=start)
        assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_names_the_data_and_so_does_the_module_that_is_loaded_from_it(tmp_path, pictures, caption_set):
    data = data_of(pictures, caption_set / "default", weights=(1, 0.5))
    fit(data, tmp_path / "run", max_steps=4)
    folder = tmp_path / "run" / "checkpoints" / "step=4"
    assert checkpoint.read_state(folder)["datamodule"] == {"lineage": list(data.source.lineage)}
    clip = ContrastiveCLIP.from_pretrained(folder)
    assert clip.lineage == Lineage(data.source.lineage)
    clip.save_pretrained(tmp_path / "exported")
    exported = ContrastiveCLIP.from_pretrained(tmp_path / "exported").lineage
    assert [one["source"] for one in exported.sources] == ["pictures.parquet", "default"]  # no folders of its maker
    assert [one["fingerprint"] for one in exported.sources] == [one["fingerprint"] for one in data.source.lineage]


CHANGES = {
    "rows": (r"pictures\.parquet gave 20 training rows, and gives 18", {"numbers": range(28), "train": 18}),
    "captions": (r"pictures\.parquet has other pictures or captions than before", {"text": "a blue square"}),
    "weight": (r"pictures\.parquet had the weight 1, and has 2", {"weights": (2,)}),
    "sources": (
        "it was trained on .*parquet, now on .*parquet and shapes",
        {"more": ("shapes",), "shapes": ShapesConfig(num_train=8)},
    ),
    "conditions": (r"pictures\.parquet gave 20 training rows, and gives 10", {"where": ("half==yes",)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_resumed_on_other_data_and_nothing_of_it_changes(tmp_path, change):
    def data(train=20, text="a red circle", more=(), numbers=range(28), **settings):
        columns = {"split": three_splits(train, (28 - train) // 2), "half": ["yes", "no"] * 14}
        path = write_source(tmp_path / "pictures.parquet", numbers, text, **columns)
        return data_of(path, *more, **settings)

    line, settings = CHANGES[change]
    fit(data(), tmp_path / "run", max_steps=4)
    log, start = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints" / "step=4"
    before = log.read_bytes()
    with pytest.raises(UserError, match=f"the training data changed: .*{line}.* start a new run") as caught:
        fit(data(**settings), tmp_path / "run", ckpt_path=start)
    assert "\n" not in str(caught.value) and log.read_bytes() == before
    fit(data(), tmp_path / "run", ckpt_path=start, max_steps=5)


def test_more_validation_data_are_said_and_like_a_checkpoint_without_a_lineage_not_refused(tmp_path, pictures, capsys):
    fit(data_of(pictures), tmp_path / "run", max_steps=4)
    start = tmp_path / "run" / "checkpoints" / "step=4"
    write_source(tmp_path / "pictures.parquet", range(32), "a red circle", split=three_splits(20, 6))
    more = data_of(pictures)
    fit(data_of(pictures), tmp_path / "run", ckpt_path=start, max_steps=5)
    assert re.search(
        r"metrics before and after do not compare: .* gave 4 val rows and 4 test rows .*, and gives 6 val rows",
        capsys.readouterr().out,
    )
    more.load_state_dict(more.state_dict())
    assert not capsys.readouterr().out
    more.load_state_dict({})  # of a checkpoint of an earlier version
    more.load_state_dict({"lineage": []})  # of a source of one's own, which says nothing


def test_rows_that_were_replaced_meanwhile_are_no_other_source(pictures):
    data = data_of(pictures)
    state = data.state_dict()
    data.replace_rows("train", data.rows["train"].without_captionless()[0])
    assert data.state_dict() == state
    data.load_state_dict(state)


def test_a_file_of_that_name_that_is_not_ours_says_nothing(tmp_path):
    for text in ('{"a": 1}', "[1, 2]", "[]"):
        (tmp_path / "data.json").write_text(text)
        assert Lineage.read(tmp_path) == Lineage()


def test_a_captioner_is_not_resumed_on_other_data_nor_its_tower_found_for_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "cache"))
    path = write_source(tmp_path / "pictures.parquet", range(60), "a red circle")  # without a column of splits
    few = TrainerConfig(max_steps=1)
    config = attrs.evolve(
        train_captioner.TINY,
        data=CaptionDataConfig(source=path, batch_size=8),
        trainer=attrs.evolve(train_captioner.TINY.trainer, max_steps=1),
        tower=attrs.evolve(train_captioner.TINY.tower, trainer=few),
        run_dir=tmp_path / "one",
    )
    train_captioner.main(config)
    write_source(tmp_path / "pictures.parquet", [200, *range(60)], "a red circle")
    towers = lambda: len(list((tmp_path / "cache").glob("tower-*")))
    with pytest.raises(UserError, match=r"the training data changed: .* gave 54 training rows, and gives 55\."):
        train_captioner.main(attrs.evolve(config, resume="last"))
    assert towers() == 1
    train_captioner.main(attrs.evolve(config, run_dir=tmp_path / "two"))
    assert towers() == 2
