"""Conditions on columns: which rows, and which captions of a row, are read, of tables and of streams."""

import datasets
import pytest
from small_sources import three_splits, write_source

from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources import opening, rows
from mlxmm.data.sources.tables import Columns
from mlxmm.data.sources.where import Condition
from mlxmm.errors import UserError


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # for a bug of Arrow's at exit


def captions(config: CaptionDataConfig, split="train") -> list[str]:
    return list(open_source(config, 0).rows[split].captions())


@pytest.fixture
def scored(tmp_path):
    """12 training rows: numbers, names, truths and missing values; and the same again for val and test."""
    numbers = range(36)
    return write_source(
        tmp_path / "scored.parquet",
        numbers,
        score=[None if i % 12 == 11 else float(i % 12) for i in numbers],
        by=["alice" if i % 2 else "bob" for i in numbers],
        good=[i % 3 == 0 for i in numbers],
        words=[["many"] * 3 for _ in numbers],
        split=[split for split in ("train", "val", "test") for _ in range(12)],
    )


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("score>=9", {9, 10}),
        ("score > 9", {10}),
        ("score<=1", {0, 1}),
        ("score<1", {0}),
        ("score==4", {4}),
        ("score!=4", set(range(11)) - {4}),  # what is missing meets no condition
        ("by==alice", {1, 3, 5, 7, 9, 11}),
        ("by!=alice", {0, 2, 4, 6, 8, 10}),
        ("good==true", {0, 3, 6, 9}),
    ],
)
def test_rows_are_kept_where_the_condition_holds(scored, where, left, capsys):
    config = CaptionDataConfig(source=scored, split_column="split", where=(where,))
    assert {int(text.split()[1]) for text in captions(config)} == left
    assert f"leaves out {12 - len(left)} of 12 train rows of {scored}" in capsys.readouterr().out


def test_a_condition_that_leaves_a_split_empty_is_refused(scored):
    with pytest.raises(UserError, match="--data.where split==train leaves no val rows"):
        open_source(CaptionDataConfig(source=scored, split_column="split", where=("split==train",)), 0)


def test_several_conditions_must_all_hold_and_no_picture_is_decoded_for_them(scored, monkeypatch):
    monkeypatch.setattr(rows, "decode_image", lambda cell: 1 / 0)
    columns = Columns(image="image", caption="caption", split="split")
    train = opening.open_rows(scored, columns, revision=None, seed=0)["train"]
    kept, left_out = train.where([Condition.parse("score>=4"), Condition.parse("by==bob")])
    assert [int(text.split()[1]) for text in kept.captions()] == [4, 6, 8, 10]
    assert list(left_out.values()) == [5, 3]


def test_a_condition_is_for_the_sources_that_have_the_column(scored, tmp_path, capsys):
    other = write_source(tmp_path / "other.parquet", range(100, 110), "other")
    config = CaptionDataConfig(source=(other, scored), split_column=None, where=("score>=9",))
    assert len(open_source(config, 0).rows["train"]) == 9 - 1 + 6  # of 10, one each for val and test; all of the second
    assert (
        f"leaves out 30 of 36 train rows of {scored}" in (out := capsys.readouterr().out)
        and "rows of " + other not in out
    )


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("height>=3", "no source has that column; there are image, caption, score, by, good, words, split"),
        ("score>=high", "column 'score' holds float64, and not high"),
        ("good==maybe", "column 'good' holds bool, and not maybe"),
        ("words==many", "a row has 1 captions and 3 words"),
        ("image==1.png", "column 'image' holds PIL.Image.Image, which has no such condition"),
        ("score>=100", "leaves no train rows of"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"streaming": True}])
def test_a_condition_that_does_not_fit_is_one_line(scored, where, line, more):
    line = "has no rows for" if more and where == "score>=100" else line
    with pytest.raises(UserError, match=line) as caught:
        open_source(CaptionDataConfig(source=scored, split_column="split", where=(where,), **more), 0)
    assert "\n" not in str(caught.value)


def test_drawn_pictures_have_no_columns():
    with pytest.raises(UserError, match="no source has that column; there are none"):
        open_source(CaptionDataConfig(where=("score>=1",)), 0)


@pytest.fixture
def listed(tmp_path):
    """20 training rows of three captions each, as a data set of captions has them: a list in every column."""
    numbers = range(24)
    return write_source(
        tmp_path / "listed.parquet",
        numbers,
        caption=[[f"low {i}", f"high {i}", f"none {i}"] for i in numbers],
        clip_score=[[0.2, 0.9 if i % 4 else 0.3, None] for i in numbers],
        captioner=[["alice", "bob", "bob"] for _ in numbers],
        split=three_splits(20),
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_of_a_row_with_several_captions_those_are_read_that_meet_the_condition(listed, streaming):
    config = CaptionDataConfig(
        source=listed, split_column="split", streaming=streaming, where=("clip_score>=0.5", "captioner==bob")
    )
    source = open_source(config, 0)
    left = [i for i in range(20) if i % 4]
    assert list(source.rows["train"].captions()) == [f"high {i}" for i in left]
    if streaming:
        stream = source.rows["train"]
        made = [stream.row(values)["captions"] for values in stream.shuffled(0, 100)]
        assert sorted(int(texts[0].split()[1]) for texts in made) == left
    else:
        assert source.rows["train"][3]["captions"] == ["high 5"] and len(source.rows["train"]) == 15
        assert source.rows["train"].without_image(3)["captions"] == ["high 5"]
    assert source.rows["val"][0]["captions"] == ["high 21"]  # the first of its two rows has none left
    assert len(open_source(CaptionDataConfig(source=listed, split_column="split"), 0).rows["train"][0]["captions"]) == 3


def test_captions_with_names_of_classes_are_compared_by_name(tmp_path):
    path = write_source(tmp_path / "rows.parquet", range(30), split=three_splits(22, 4))
    names = datasets.ClassLabel(names=["cat", "dog"])
    table = (
        datasets.Dataset.from_parquet(path).add_column("label", [i % 2 for i in range(30)]).cast_column("label", names)
    )
    table.to_parquet(path)
    kept = open_source(CaptionDataConfig(source=path, split_column="split", where=("label==dog",)), 0).rows
    assert all(int(text.split()[1]) % 2 for split in kept.values() for text in split.captions())
    with pytest.raises(UserError, match="column 'label' holds int64, and not bird"):
        open_source(CaptionDataConfig(source=path, split_column="split", where=("label==bird",)), 0)
