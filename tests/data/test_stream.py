"""Streams: the rows of the files, in an order that is a function of (seed, epoch), and resumed to the bit."""

import copy
import gc
import hashlib
import io
import json
import pickle
import re
import threading
import zipfile
from pathlib import Path

import attrs
import datasets
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from small_clip import small_clip
from small_sources import write_source

from callbacks import CachedFeatures
from mlxmm import Trainer
from mlxmm.compute.deterministic import repeats_to_the_bit
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.stream import StreamRows
from mlxmm.data.sources.tables import Columns
from mlxmm.data.sources.twins import picture_key
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.preprocessing.tokenizers import train_tokenizer
from recipes import evaluate_clip, train_clip

NUM_TRAIN = 40


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # for a bug of Arrow's at exit


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (i, 255 - i, 7)).save(file, "PNG")
    return file.getvalue()


def rows(numbers, broken=()) -> dict:
    images = [{"bytes": b"no picture" if i in broken else png(i), "path": f"{i}.png"} for i in numbers]
    return {"image": images, "caption": [[f"picture {i} caption {j}" for j in range(5)] for i in numbers]}


def write(path, columns: dict) -> None:
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False)).to_parquet(path)


@pytest.fixture
def make_folder(tmp_path):
    """A folder of parquet files: training rows in three of them, one for each of the other splits."""

    def make(broken=()) -> str:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for shard, numbers in enumerate(np.array_split(range(NUM_TRAIN), 3)):
            write(folder / f"train-{shard:05}-of-00003.parquet", rows(numbers.tolist(), broken))
        write(folder / "validation-00000-of-00001.parquet", rows(range(100, 104)))
        write(folder / "test-00000-of-00001.parquet", rows(range(200, 206)))
        return str(folder)

    return make


def transform(row, caption):
    words = caption.split()
    return {"pixels": np.asarray(row["image"]), "row": np.array(int(words[1])), "caption": np.array(int(words[3]))}


def opened(source, seed=0, **settings) -> CaptionData:
    config = CaptionDataConfig(
        **({"source": source, "batch_size": 6, "streaming": True, "shuffle_buffer": 8} | settings)
    )
    data = CaptionData(open_source(config, seed), transform=transform)
    return data


def seen(data, epoch=0, start=0) -> list[int]:
    return [int(i) for batch in data.train_dataloader().epoch(epoch, start) for i in batch["row"]]


def assert_same(batches, others) -> None:
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_stream_gives_each_row_of_the_files_once_in_whole_batches(make_folder, num_threads):
    data = opened(make_folder(), batch_size=8, num_threads=num_threads)
    batches = list(data.train_dataloader().epoch(0))
    assert [len(batch["row"]) for batch in batches] == [8] * 5
    assert sorted(seen(data)) == list(range(NUM_TRAIN))
    for batch in batches:
        for i, pixels in zip(batch["row"], batch["pixels"]):
            assert (pixels == (i, 255 - i, 7)).all()  # the picture of its caption
    assert [len(data.rows[split]) for split in ("val", "test")] == [4, 6]
    assert data.rows["test"][3]["captions"] == [f"picture 203 caption {j}" for j in range(5)]
    assert len(seen(opened(data.source.config.source))) == 36  # 40 rows in sixes: what is left over makes no batch


def test_another_epoch_or_seed_is_another_order_with_other_captions(make_folder):
    data = opened(make_folder(), batch_size=8)
    orders = [seen(data), seen(data, epoch=1), seen(opened(data.source.config.source, seed=1, batch_size=8))]
    assert len({tuple(order) for order in [*orders, list(range(NUM_TRAIN))]}) == 4
    captions = [np.concatenate([b["caption"] for b in data.train_dataloader().epoch(i)]) for i in range(4)]
    assert set(np.concatenate(captions)) == {0, 1, 2, 3, 4}
    assert len({tuple(of_epoch) for of_epoch in captions}) == 4  # by place, too
    by_row = [dict(zip(seen(data, i), captions[i])) for i in range(4)]
    assert len({tuple(sorted(of_epoch.items())) for of_epoch in by_row}) == 4


@pytest.mark.parametrize("broken", [(), (0, 3, 21)])
def test_an_epoch_resumed_gives_the_batches_it_would_have_given(make_folder, broken):
    data = opened(make_folder(broken), random_crop=True)
    whole = list(data.train_dataloader().epoch(2))
    for start in (0, 1, 4):
        again = opened(data.source.config.source, random_crop=True)  # as another process would
        assert_same(again.train_dataloader().epoch(2, start), whole[start:])


@pytest.mark.parametrize("world_size", [2, 3])  # of three files, which are not dealt out whole
def test_processes_share_the_rows_out(make_folder, monkeypatch, world_size):
    data, shares = opened(make_folder(), batch_size=1), []
    monkeypatch.setattr(collectives, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(collectives, "rank", lambda: rank)  # noqa: B023
        shares.append(seen(data, epoch=3))
    assert sorted(i for share in shares for i in share) == list(range(NUM_TRAIN))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_picture_that_cannot_be_decoded_is_left_out_and_named(make_folder, capsys):
    data = opened(make_folder(broken=(7,)), batch_size=1)
    assert sorted(seen(data)) == [i for i in range(NUM_TRAIN) if i != 7]
    assert "skipped, cannot be decoded: 7.png: not a picture" in capsys.readouterr().out


def test_a_picture_of_a_stream_that_is_held_out_too_is_named_once(tmp_path, capsys):
    write_source(tmp_path / "train-0.parquet", [*range(12), 3, 3, 100], "a thing")
    write_source(tmp_path / "val-0.parquet", [20, 21, 3, 3], "a thing")
    write_source(tmp_path / "test-0.parquet", [22, 100], "a thing")
    source = open_source(CaptionDataConfig(source=str(tmp_path), streaming=True, batch_size=3), 0)
    assert [len(source.rows[split]) for split in ("val", "test")] == [3, 2]  # rows of one picture are one
    data = CaptionData(source, transform=lambda row, caption: {"n": np.zeros(1)})
    for epoch in (0, 1):
        assert len(list(data.train_dataloader().epoch(epoch))) == 5  # rows of train stay as they are
    told = capsys.readouterr().out
    assert sorted(re.findall(r"^(\d+).png of .* is in train and in (\w+): ", told, re.MULTILINE)) == [
        ("100", "test"),
        ("3", "val"),
    ]


def test_a_row_without_a_picture_is_left_out_and_named_by_its_captions(tmp_path, capsys):
    columns = rows(range(9)) | {"split": ["train", "val", "test"] * 3}
    columns["image"][3] = None
    write(tmp_path / "rows.parquet", columns)
    assert sorted(seen(opened(str(tmp_path / "rows.parquet"), split_column="split", batch_size=2))) == [0, 6]
    assert "the picture of ['picture 3 caption 0'" in capsys.readouterr().out


def test_more_than_one_bad_picture_in_a_hundred_ends_the_run_in_one_line(make_folder):
    data = opened(make_folder(broken=range(0, NUM_TRAIN, 2)))
    with pytest.raises(
        UserError, match=r"^1\d of \d\d rows lack picture or caption, more than one in a hundred"
    ) as caught:
        seen(data)
    assert "\n" not in str(caught.value)


def test_rows_of_a_stream_are_copied_and_pickled_and_hash_nothing_where_nothing_is_held_out(monkeypatch):
    stream = StreamRows("source", None, None)
    assert copy.deepcopy(stream) == stream == pickle.loads(pickle.dumps(stream))
    cell, hashed, sha256 = {"bytes": png(1), "path": None}, [], hashlib.sha256
    table = datasets.Dataset.from_list([{"caption": ["a thing"]}])
    columns = Columns(image="image", caption="caption", split=None)
    held_out = {picture_key(cell): "val"}
    monkeypatch.setattr(hashlib, "sha256", lambda *data: hashed.append(data) or sha256(*data))
    for others, num in (({}, 0), (held_out, 1)):
        StreamRows("source", table, columns, others).row({"image": cell, "caption": ["a thing"]})
        assert len(hashed) == num


def test_a_column_of_splits_is_followed_and_held_out_rows_are_limited(tmp_path):
    split = ["test", "train", "dev", "train"] * 10
    write(tmp_path / "all.parquet", rows(range(40)) | {"split": split})
    data = opened(str(tmp_path / "all.parquet"), split_column="split", held_out=4)
    assert set(seen(data)) <= set(range(1, 40, 2)) and len(seen(data)) == 18
    assert [data.rows["val"][i]["captions"][0].split()[1] for i in range(len(data.rows["val"]))] == [
        "2",
        "6",
        "10",
        "14",
    ]
    assert len(data.rows["test"]) == 4


def test_a_stream_of_training_rows_alone_is_opened_where_nothing_is_held_out(tmp_path):
    write(tmp_path / "all.parquet", rows(range(8)) | {"split": ["train"] * 8})
    config = CaptionDataConfig(source=str(tmp_path / "all.parquet"), split_column="split", streaming=True)
    assert list(open_source(config, 0, to_train=False).rows) == ["train"]


def test_a_column_of_classes_and_a_folder_of_images_are_streamed_too(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        for i in range(8):
            (tmp_path / split / f"{i}.png").write_bytes(png(i))
        lines = [json.dumps({"file_name": f"{i}.png", "caption": f"picture {i} caption 0"}) for i in range(8)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    assert sorted(seen(opened(str(tmp_path), batch_size=4))) == list(range(8))
    labels = datasets.ClassLabel(names=["cat", "dog"])
    table = datasets.Dataset.from_dict(rows(range(12)) | {"label": [0, 1] * 6, "split": ["train", "val", "test"] * 4})
    table = table.cast_column("label", labels).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(tmp_path / "classes.parquet")
    data = opened(str(tmp_path / "classes.parquet"), caption_column="label", split_column="split")
    assert [caption for _, caption in data.source.sample_texts()] == ["cat", "dog"] * 2


def test_pictures_in_an_archive_are_fetched_from_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for i in range(9):
            archive.writestr(f"{i}.png", png(i))
    columns = rows(range(9)) | {"split": ["train", "val", "test"] * 3}
    columns["image"] = [{"bytes": None, "path": f"zip://{i}.png::{tmp_path / 'pictures.zip'}"} for i in range(9)]
    write(tmp_path / "rows.parquet", columns)
    data = opened(str(tmp_path / "rows.parquet"), split_column="split", batch_size=3)
    [batch] = data.train_dataloader().epoch(0)
    assert sorted(batch["row"]) == [0, 3, 6] and (batch["pixels"][:, 0, 0, 0] == batch["row"]).all()
    assert data.rows["val"][2]["image"].getpixel((0, 0)) == (7, 248, 7)


def test_pictures_that_come_decoded_as_from_the_hub_are_decoded_here_instead(make_folder, monkeypatch, capsys):
    load = datasets.load_dataset

    def remote(*args, **options):
        return {name: table.decode(num_threads=2) for name, table in load(*args, **options).items()}

    monkeypatch.setattr(datasets, "load_dataset", remote)
    assert len(seen(opened(make_folder(broken=(7,)), batch_size=1))) == NUM_TRAIN - 1
    assert "7.png" in capsys.readouterr().out


def test_the_first_captions_train_a_tokenizer(make_folder):
    texts = [caption for _, caption in opened(make_folder()).source.sample_texts(12)]
    assert texts == [f"picture {i} caption {j}" for i in (0, 1, 2) for j in range(5)][:12]
    assert len(train_tokenizer(texts, 300)) > 256


def clip_data(source) -> tuple:
    clip = small_clip(patch_dropout=0.5)
    data = opened(source, random_crop=True)
    data.transform = clip.transform
    return clip, data


def test_a_run_stopped_within_an_epoch_goes_on_to_the_bit(make_folder, tmp_path):
    source, options = make_folder(), {"max_steps": 9, "logger": False, "enable_checkpointing": False}
    options["deterministic"] = not repeats_to_the_bit(mx.default_device(), deterministic=False)
    options["val_check_interval"] = 3
    clip, data = clip_data(source)
    Trainer(**options).fit(clip, data)
    cut, data = clip_data(source)
    trainer = Trainer(**options, limit_val_batches=0)  # ends in the second epoch, which has 6 batches
    cut.on_train_batch_end = lambda metrics, batches: setattr(trainer, "should_stop", trainer.global_step == 8)
    trainer.fit(cut, data)
    assert (trainer.current_epoch, trainer.batch_idx) == (1, 2)
    trainer.save_checkpoint(tmp_path / "cut")
    resumed, data = clip_data(source)
    Trainer(**options).fit(resumed, data, ckpt_path=tmp_path / "cut")
    pairs = zip(tree_flatten(clip.parameters()), tree_flatten(resumed.parameters()), strict=True)
    assert all(name == other and np.array_equal(np.array(a), np.array(b)) for (name, a), (other, b) in pairs)


def test_a_stream_needs_a_number_of_updates(make_folder):
    clip, data = clip_data(make_folder())
    with pytest.raises(UserError, match="set max_steps: the training data do not tell how many"):
        Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(clip, data)


def test_an_epoch_left_early_leaves_no_thread_behind(make_folder):
    before = set(threading.enumerate())
    batches = opened(make_folder()).train_dataloader().epoch(0)
    next(batches)
    assert set(threading.enumerate()) - before
    del batches
    gc.collect()
    assert not [thread for thread in set(threading.enumerate()) - before if "prefetch" in thread.name]


def test_the_recipe_trains_on_a_stream(make_folder, tmp_path):
    config = train_clip.Config(run_dir=tmp_path / "run")
    trainer = attrs.evolve(config.trainer, max_steps=3, compile=False, enable_progress_bar=False)
    data = CaptionDataConfig(source=make_folder(), batch_size=6, streaming=True)
    train_clip.main(attrs.evolve(config, data=data, trainer=trainer))
    assert "val/loss" in json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "shapes"}, "`shapes` are drawn, not read"),
        ({"source": "no/such/file.parquet"}, "is not there"),
        ({"source": "one.parquet"}, "a stream cannot be split at random: one.parquet needs --data.split-column"),
        ({"source": "one.parquet", "image_column": "picture"}, "no column 'picture'; it has image, caption, split"),
        ({"source": "one.parquet", "split_column": "split"}, "say train, val or test; it holds 'other'"),
        ({"source": "broken.parquet"}, "broken.parquet cannot be read"),
    ],
)
def test_what_cannot_be_streamed_is_one_clear_line(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one.parquet", rows(range(3)) | {"split": ["other"] * 3})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=message) as caught:
        opened(**settings)
    assert "\n" not in str(caught.value)


def test_what_needs_all_rows_at_once_is_refused(make_folder, tmp_path):
    clip, data = small_clip(), opened(make_folder())
    data.transform = clip.transform
    with pytest.raises(UserError, match="a language model is not trained on a stream"):
        data.source.texts()
    clip.freeze()
    clip.spare = mx.zeros(1)  # something to train
    trainer = Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, callbacks=[CachedFeatures(tmp_path, tower="network")]
    )
    with pytest.raises(UserError, match="features of a stream cannot be cached"):
        trainer.fit(clip, data)
    with pytest.raises(UserError, match="--labels reads all training pictures"):
        evaluate_clip._check(evaluate_clip.Config(data=data.source.config, labels=True), data.source)
    with pytest.raises(UserError, match="--split train: choose one of val, test"):
        data.source.require_split("train")


def test_a_row_without_a_caption_is_passed_over_and_named(tmp_path, capsys):
    split = ["test", "train", "dev", "train"] * 10
    table = rows(range(40)) | {"split": split}
    table["caption"][1] = [" ", ""]
    write(tmp_path / "all.parquet", table)
    data = opened(str(tmp_path / "all.parquet"), split_column="split")
    assert 1 not in seen(data) and "skipped, has no caption" in capsys.readouterr().out


def test_held_out_rows_are_found_in_one_pass_over_a_column_of_splits(tmp_path, monkeypatch):
    write(tmp_path / "all.parquet", rows(range(40)) | {"split": ["test", "dev", *["train"] * 38]})
    read, table = [], datasets.IterableDataset.__iter__
    monkeypatch.setattr(
        datasets.IterableDataset, "__iter__", lambda self: (read.append(1) or row for row in table(self))
    )
    opened(str(tmp_path / "all.parquet"), split_column="split")
    assert len(read) == 40


def test_files_that_break_off_end_training_in_one_line(make_folder):
    folder = make_folder()
    data = opened(folder)
    for path in Path(folder).glob("train*"):
        path.write_bytes(path.read_bytes()[:-100] + b"0" * 100)
    with pytest.raises(UserError, match="cannot be read") as caught:
        seen(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("caption", [7, 0.5, {"raw": "a dog"}])
def test_a_column_that_holds_no_captions_is_refused(tmp_path, caption):
    columns = rows(range(9)) | {"caption": [caption] * 9, "split": ["train", "val", "test"] * 3}
    write(tmp_path / "rows.parquet", columns)
    for streaming in (True, False):
        with pytest.raises(UserError, match="column 'caption' of .* must hold a caption"):
            opened(str(tmp_path / "rows.parquet"), split_column="split", streaming=streaming)


def test_a_part_of_an_epoch_of_unknown_length_is_refused(make_folder):
    data = opened(make_folder())
    with pytest.raises(UserError, match="val_check_interval=0.5 is a fraction of an epoch"):
        Trainer(max_steps=2, logger=False, enable_checkpointing=False, val_check_interval=0.5).fit(small_clip(), data)


def test_a_picture_elsewhere_that_cannot_be_fetched_is_one_line(make_folder):
    folder = make_folder()
    row = {"image": {"bytes": None, "path": f"zip://1.png::{folder}/gone.zip"}, "caption": ["a dog"]}
    with pytest.raises(UserError, match="pictures cannot be read: FileNotFoundError"):
        opened(folder).rows["train"].row(row)
