"""Mixtures: how many rows of each source an epoch has, that no test picture is trained on, and exact resumes."""

from collections import Counter

import attrs
import numpy as np
import pytest
from small_sources import three_splits, write_source

from mlxmm.cli import parse_config
from mlxmm.config import from_json, to_json
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.pictures import open_pictures, pictures_of
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from recipes.train_clip import PRESETS

SHAPES = ShapesConfig(num_train=30, num_val=4, num_test=4)


def transform(row, caption):
    name, number = caption.split()
    return {"source": np.array("ab".index(name)), "row": np.array(int(number))}


@pytest.fixture
def two(tmp_path):
    """Source a: 40 training rows, and 2 each of val and test. Source b: 20 rows without splits."""
    first = write_source(tmp_path / "a.parquet", range(44), "a", split=three_splits(40))
    return first, write_source(tmp_path / "b.parquet", range(100, 120), "b")


def opened(two, weights=(), **settings) -> CaptionData:
    config = CaptionDataConfig(
        **{"source": two, "weights": weights, "split_column": "split", "batch_size": 5} | settings
    )
    return CaptionData(open_source(config, 0), transform=transform)


def seen(data, epoch=0, start=0) -> list[tuple[int, int]]:
    batches = list(data.train_dataloader().epoch(epoch, start))
    return [(int(s), int(r)) for batch in batches for s, r in zip(batch["source"], batch["row"])]


@pytest.mark.parametrize(("weights", "each"), [((), (40, 20)), ((1, 0.5), (40, 10)), ((0.25, 2.5), (10, 50))])
def test_an_epoch_has_of_each_source_as_many_rows_as_its_weight_says(two, weights, each):
    data = opened(two, weights)
    assert len(data.train_dataloader()) == sum(each) // 5
    for epoch in range(3):
        rows = seen(data, epoch)
        assert (sum(s == 0 for s, _ in rows), sum(s == 1 for s, _ in rows)) == each
        for source, weight in enumerate(weights):
            times = Counter(row for one, row in rows if one == source)
            assert set(times.values()) <= {int(weight), int(np.ceil(weight))} - {0}
    assert [len(data.rows[split]) for split in ("val", "test")] == [2, 2]  # of the first alone


def test_each_epoch_has_another_half_and_sources_stand_among_each_other(two):
    data = opened(two, (1, 0.5))
    halves = [{row for source, row in seen(data, epoch) if source} for epoch in range(8)]
    assert all(len(half) == 10 for half in halves) and len(set(map(frozenset, halves))) == 8
    assert len(set.union(*halves)) == 20  # none is never seen
    orders = [[source for source, _ in seen(data, epoch)] for epoch in range(3)]
    assert all(order != sorted(order) for order in orders) and len(set(map(tuple, orders))) == 3


def test_the_same_source_twice_by_halves_is_not_the_same_half_twice(two):
    data = opened((two[0], two[0]), (0.5, 0.5))
    assert all(len(set(seen(data, epoch))) > 20 for epoch in range(5))


def test_an_epoch_resumed_gives_the_batches_it_would_have_given(two):
    whole = seen(opened(two, (0.5, 1.5)), 2)
    for start in (1, 4, 9):
        assert seen(opened(two, (0.5, 1.5)), 2, start) == whole[5 * start :]


def test_processes_share_an_epoch_out(two, monkeypatch):
    data, alone, shares = opened(two, (1, 0.5)), seen(opened(two, (1, 0.5)), 3), []
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        shares.append(seen(data, 3))
    assert [len(share) for share in shares] == [25, 25]
    assert sorted(shares[0] + shares[1]) == sorted(alone)


def test_one_source_or_a_weight_of_one_leaves_its_order_as_it_was(two):
    plain = opened(two[:1])
    assert seen(opened(two[:1], (1,))) == seen(opened(two, (1, 0))) == seen(plain)
    assert plain.source.parts == ()


def test_no_picture_of_the_firsts_val_or_test_is_trained_on_whatever_its_source(two, tmp_path, capsys):
    first = two[0]
    copies = write_source(tmp_path / "copies.parquet", range(35, 60), "b")  # 40 to 43 are val and test of the first
    data = opened((first, copies))
    assert {row for source, row in seen(data) if source} <= set(range(35, 60)) - {40, 41, 42, 43}
    assert "left out" in (line := capsys.readouterr().out) and "4 of 25" in line and "40.png" in line
    assert [one["rows"]["train"] for one in data.source.lineage] == [40, 21]
    drawn = CaptionDataConfig(source=("shapes", "shapes"), shapes=SHAPES)
    assert len(open_source(drawn, 0).rows["train"]) == 60


def test_val_and_test_rows_of_another_source_are_not_trained_on_unasked(two, tmp_path):
    folder = tmp_path / "split"
    folder.mkdir()
    write_source(folder / "train-0.parquet", range(200, 206), "b")
    write_source(folder / "test-0.parquet", range(300, 306), "b")
    assert {row for source, row in seen(opened((two[0], str(folder)))) if source} <= set(range(200, 206))
    labelled = write_source(tmp_path / "labelled.parquet", range(400, 410), "b", split=three_splits(6))
    assert {row for source, row in seen(opened((two[0], labelled))) if source} <= set(range(400, 406))
    (folder / "train-0.parquet").unlink()
    with pytest.raises(UserError, match="has no rows for train; its splits are test, which are not trained on unasked"):
        opened((two[0], str(folder)))
    assert len(opened((two[0], f"{folder}/*.parquet")).rows["train"]) == 46
    assert len(opened((two[0], str(folder)), split_column="random").rows["train"]) == 46
    write_source(folder / "validation-0.parquet", range(500, 506), "b")
    with pytest.raises(UserError, match="has no rows for train; its splits are val, test"):
        opened((two[0], str(folder)))


def test_texts_and_samples_are_of_all_sources_and_shapes_are_drawn_anew(two):
    source = opened(two).source
    assert {text.split()[0] for _, text in source.texts()} == {"a", "b"} and len(source.texts()) == 60
    assert {text.split()[0] for _, text in source.sample_texts(6)} == {"a", "b"} and len(source.sample_texts(6)) == 6
    config = CaptionDataConfig(source=("shapes", two[1]), shapes=SHAPES)
    drawn = open_source(config, 0)
    rows, fresh = drawn.rows["train"], drawn.fresh_rows(1)
    assert drawn.is_synthetic and len(rows) == len(fresh) == 50 and len(drawn.texts()) == 50
    assert [one[29]["id"] for one in (rows, fresh)] == ["train-0-29", "train-1-29"]
    assert rows[30]["id"] == fresh[30]["id"] and rows.fingerprint() != fresh.fingerprint()
    assert not open_source(attrs.evolve(config, source=(two[1], "shapes")), 0).is_synthetic


def test_pictures_of_a_mixture_have_the_hashes_of_their_files(two):
    source = opened(two).source
    pictures = pictures_of(source.rows["train"])
    alone = [open_pictures(CaptionDataConfig(source=name), 0, "all") for name in two]
    assert len(pictures) == 60
    assert pictures.sha256(5) == alone[0].sha256(5) and pictures.sha256(41) == alone[1].sha256(1)
    assert pictures.name(41) == alone[1].name(1) and pictures[41].getpixel((0, 0)) == (101, 0, 7)
    with pytest.raises(IndexError):
        source.rows["train"][60]


def test_rows_that_replace_a_weighted_mixture_must_be_as_many(two):
    data = opened(two, (1, 0.5))
    data.replace_rows("train", data.rows["train"])
    with pytest.raises(UserError, match="40 training rows cannot replace 60"):
        data.replace_rows("train", data.rows["train"].parts[0])
    opened(two).replace_rows("train", [1, 2, 3])  # without weights, rows are rows


def test_a_lone_string_and_the_settings_of_an_older_run_are_one_source():
    lone = CaptionDataConfig(source="user/name", config_name="refresh-2")
    assert lone == CaptionDataConfig(source=("user/name",), config_name=("refresh-2",))
    old = to_json(lone) | {"source": "user/name", "config_name": None}
    del old["weights"], old["where"]
    assert from_json(CaptionDataConfig, old) == CaptionDataConfig(source="user/name")
    assert from_json(CaptionDataConfig, to_json(lone)) == lone
    with pytest.raises(UserError, match="settings.source"):
        from_json(CaptionDataConfig, old | {"source": [1]})


def test_each_source_of_a_mixture_may_have_a_configuration_of_its_own():
    config = CaptionDataConfig(source=("one.parquet", "user/name"), config_name=("default", "refresh-2"))
    assert [one.only_config_name for one in config.each()] == [None, "refresh-2"]
    assert [one.only_source for one in config.each()] == ["one.parquet", "user/name"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--data.source a b --data.weights 1", "--data.weights 1: give one for each source, 2 in all"),
        ("--data.source a b --data.weights 1 -1", "a weight cannot be negative"),
        ("--data.source a b --data.weights 1 inf", "a weight cannot be negative or without end"),
        ("--data.source a b --data.weights 0 0", "nothing would be trained on"),
        ("--data.source a b --data.streaming", "a stream is not mixed"),
        ("--data.source a b --data.revision v1", "write each as user/name@revision"),
        ("--data.source a b --data.config-name x", "--data.config-name: 1 names, 2 sources"),
        ("--data.source", "--data.source names nothing"),
        ("--data.where clip_score=0.6", "write it as clip_score>=0.6"),
        ("--data.where >=3", "write it as"),
    ],
)
def test_wrong_mixtures_and_conditions_are_one_line_as_soon_as_the_flags_are_read(flags, line):
    with pytest.raises(UserError, match=line) as caught:
        parse_config("train_clip", PRESETS, flags.split())
    assert "\n" not in str(caught.value)


def test_a_weight_that_gives_no_row_and_pictures_of_two_sources_are_refused(two):
    with pytest.raises(UserError, match=r"the weight 0\.001 of .*b\.parquet gives none of its 20 training rows"):
        opened(two, (1, 0.001))
    with pytest.raises(UserError, match="one is wanted here, these are 2"):
        open_pictures(CaptionDataConfig(source=two), 0, "all")
