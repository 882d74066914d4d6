"""Loggers: what TensorBoard's reader finds in its files, W&B and Trackio without a network, and names in a setting."""

import importlib.util
import json
import math
import time

import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import DataModule, JSONLLogger, TensorBoardLogger, TrackioLogger, Trainer, TrainerConfig, WandbLogger
from mlxmm.callbacks import DeviceStatsMonitor, LearningRateMonitor, ModelCheckpoint, ThroughputMonitor
from mlxmm.errors import UserError
from mlxmm.optimizers import OptimizerConfig
from mlxmm.training.logger import markdown_table, repeatable
from mlxmm.training.loggers import make_loggers


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def hparams(events, tag):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    return HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)


class Data(DataModule):
    def __init__(self):
        self.config = OptimizerConfig()

    def train_dataloader(self):
        return DistinctBatches()

    val_dataloader = test_dataloader = train_dataloader


@pytest.fixture
def fit(make_trainer, tmp_path):
    def run(ckpt_path=None, **settings):
        trainer = make_trainer(default_root_dir=tmp_path, **{"log_every_n_steps": 2} | settings)
        trainer.fit(TinyRegression(), datamodule=Data(), ckpt_path=ckpt_path)
        return trainer

    return run


def test_results_sort_before_what_the_machine_did(fit, tmp_path):
    monitors = [LearningRateMonitor(), ThroughputMonitor(), DeviceStatsMonitor()]
    fit(max_steps=4, val_check_interval=2, callbacks=monitors, logger=TensorBoardLogger(tmp_path))
    groups = [tag.split("/")[0] for tag in sorted(read(tmp_path).Tags()["scalars"])]
    assert list(dict.fromkeys(groups)) == ["train", "val", "vitals"]
    vitals = {tag for tag in read(tmp_path).Tags()["scalars"] if tag.startswith("vitals/")}
    assert {"vitals/epoch", "vitals/lr", "vitals/memory/peak_mib", "vitals/throughput/examples_per_second"} <= vitals


def test_the_table_of_settings_takes_its_metrics_from_the_scalars_and_names_the_data(fit, tmp_path):
    fit(max_steps=2, logger=TensorBoardLogger(tmp_path))
    events = read(tmp_path)
    settings = hparams(events, "session_start_info").session_start_info.hparams
    assert settings["data.learning_rate"].number_value == OptimizerConfig().learning_rate
    assert settings["trainer.max_steps"].number_value == 2
    assert hparams(events, "session_end_info").session_end_info.status == 1  # success
    with pytest.raises(KeyError):  # it would be the only run whose columns are shown
        events.SummaryMetadata("_hparams_/experiment")


def test_the_results_of_a_test_are_on_disk_at_once_and_hide_nothing(fit, tmp_path):
    settings = {"callbacks": [ModelCheckpoint(every_n_train_steps=2)], "logger": True, "log_every_n_steps": 1}
    fit(max_steps=4, **settings)
    trainer = fit(max_steps=8, ckpt_path="last", **settings)
    trainer.test(datamodule=Data())
    trainer.log({"test/extra": 3.0})
    events = read(tmp_path)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [(event.step, event.value) for event in events.Scalars("test/extra")] == [(8, 3.0)]
    assert [event.step for event in events.Scalars("test/loss")] == [8]


def test_tables_histograms_and_embeddings_are_in_tensorboards_files(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_table("val/samples", ("", "said"), [(0, "a | b"), (1, "two\nlines")], 3)
    logger.log_histogram("weights/head", np.array([[1.0, np.nan], [3.0, np.inf]]), 3)
    logger.log_histogram("weights/none", np.array([np.nan]), 3)
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    for _ in range(2):  # the second is that of a resumed run
        logger.log_embedding("pairs", np.eye(2), ("kind", "text"), [("picture", "one"), ("caption", "two")], pixels, 3)
    logger.finalize("success")
    events = read(tmp_path)
    assert "val/samples/text_summary" in events.Tags()["tensors"] and events.Tags()["histograms"] == ["weights/head"]
    told = events.Tensors("val/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert told == "|  | said |\n| --- | --- |\n| 0 | a \\| b |\n| 1 | two lines |"
    assert events.Histograms("weights/head")[0].histogram_value.num == 2
    assert (tmp_path / "00003/pairs/metadata.tsv").read_text().splitlines() == [
        "kind\ttext",
        "picture\tone",
        "caption\ttwo",
    ]
    assert (tmp_path / "projector_config.pbtxt").read_text().count("embeddings {") == 1


def test_a_table_is_markdown():
    assert markdown_table(("a",), [(1,)]) == "| a |\n| --- |\n| 1 |"


def test_what_no_other_run_repeats_is_left_out():
    assert repeatable({"val/loss": 1.0, "memory/peak_mib": 2.0, "throughput/mfu": 3.0}) == {"val/loss": 1.0}


def test_none_leaves_json_lines_alone(fit, tmp_path):
    trainer = fit(max_steps=2, logger="none")
    assert [type(logger) for logger in trainer.loggers] == [JSONLLogger]
    assert not list(tmp_path.glob("events*")) and (tmp_path / "metrics.jsonl").exists()
    both = [type(one) for one in Trainer(TrainerConfig(logger="tensorboard", default_root_dir=tmp_path)).loggers]
    assert both == [JSONLLogger, TensorBoardLogger]


def test_a_name_that_is_not_known_is_one_line():
    with pytest.raises(UserError, match="^logger='csv': choose of tensorboard, wandb, trackio, with commas between"):
        TrainerConfig(logger="csv")
    with pytest.raises(UserError, match="logger='tensorboard,': choose of"):
        make_loggers("tensorboard,", "runs")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_one_line(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"logger='tensorboard,{name}' needs {name}: pip install {name}"):
        TrainerConfig(logger=f"tensorboard,{name}")
    (tmp_path / name).mkdir()  # what wandb leaves where it ran is no package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"pip install {name}"):
        TrainerConfig(logger=name)


def write_everything(logger):
    logger.log_hyperparams({"module": {"width": 8}})
    logger.log_metrics({"train/loss": 2.0}, 1, 0)
    logger.log_images("val/samples", np.zeros((1, 8, 8, 3), np.uint8), 2)
    logger.log_text("note", "a < b", 2)
    logger.log_table("val/table", ("", "said"), [(0, "yes")], 2)
    logger.log_histogram("weights/head", np.arange(9.0), 2)
    logger.finalize("success")
    logger.log_metrics({"test/loss": 1.0}, 2, 0)  # after the run
    logger.finalize("success")


def test_wandb_keeps_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_everything(WandbLogger(tmp_path))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and len({run.name.rpartition("-")[2] for run in runs}) == 1  # one id: the test's results are the run's
    assert list((tmp_path / "wandb").glob("*/files/media/images/val/samples*.png"))


def test_trackio_keeps_a_run_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # which it reads when it is imported
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    write_everything(TrackioLogger(tmp_path / "one", project="mlxmm-test"))
    name = f"{tmp_path.name}-one"
    rows = sqlite_storage.SQLiteStorage.get_logs("mlxmm-test", name)
    told = {key: row for row in rows for key in row}
    assert told["train/loss"]["train/loss"] == 2.0 and told["test/loss"]["step"] == 2 and "val/samples" in told


def test_steps_are_in_order_after_a_clock_that_was_put_back(fit, tmp_path, monkeypatch):
    settings = {"callbacks": [ModelCheckpoint(every_n_train_steps=2)], "logger": True, "log_every_n_steps": 1}
    fit(max_steps=4, **settings)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    fit(max_steps=8, ckpt_path="last", **settings).test(datamodule=Data())
    monkeypatch.undo()
    fit(max_steps=9, ckpt_path="last", **settings)
    events = read(tmp_path)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in events.Scalars("test/loss")] == [8]


def test_tensorboard_shows_the_branch_that_goes_on(fit, tmp_path):
    keep = lambda: [ModelCheckpoint(every_n_train_steps=2, monitor="train/loss", save_top_k=-1)]
    settings = {"logger": "tensorboard", "log_every_n_steps": 1}
    fit(max_steps=8, callbacks=keep(), **settings)
    fit(max_steps=6, callbacks=keep(), ckpt_path=tmp_path / "checkpoints/step=4", **settings)
    fit(max_steps=7, callbacks=keep(), ckpt_path="last", **settings)
    assert [event.step for event in read(tmp_path).Scalars("train/loss")] == list(range(1, 8))


def test_tensorboard_shows_several_runs_in_one_folder_as_several(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for number, one in enumerate((logger, logger, TensorBoardLogger(tmp_path))):
        fit(max_steps=number + 1, logger=one, log_every_n_steps=1)
    folders = [tmp_path / "earlier_0", tmp_path / "earlier_1", tmp_path]
    assert [read(folder).Scalars("train/loss")[-1].step for folder in folders] == [1, 2, 3]


def trained_steps(folder) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def test_each_log_is_cut_at_its_own_place_whatever_the_order_of_loggers(fit, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = type("More", (JSONLLogger,), {})
    fit(max_steps=4, logger=[more(one), JSONLLogger(two)], callbacks=[keep := ModelCheckpoint(every_n_train_steps=2)])
    for folder in (one, two):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5}\n{"ste')
    fit(max_steps=5, logger=[JSONLLogger(two), more(one)], callbacks=[keep], ckpt_path="last", log_every_n_steps=1)
    for folder in (one, two):
        assert trained_steps(folder) == [2, 4, 5]


def test_a_log_that_the_checkpoint_does_not_know_is_cut_by_its_steps(fit, tmp_path):
    fit(max_steps=4, logger=True, log_every_n_steps=1)
    silent = fit(max_steps=3, logger=False)
    silent.save_checkpoint(tmp_path / "c")
    fit(max_steps=5, logger=True, log_every_n_steps=1, ckpt_path=tmp_path / "c")
    assert trained_steps(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", [JSONLLogger, TensorBoardLogger])
def test_a_full_disk_costs_the_log_and_not_the_run_and_the_log_goes_on_when_there_is_room(
    tmp_path, full_disk, capsys, kind
):
    logger = kind(tmp_path)
    for step in range(1, 101):
        if step == 40:
            logger.flush()
            full_disk(sum(path.stat().st_size for path in tmp_path.iterdir()) + 10)
        logger.log_metrics({"loss": float(step)}, step, 0)  # in TensorBoard's thread, which must not die of it
        if step == 60:
            logger.flush()
        if step == 80:
            full_disk(None)
            logger.flush()
    logger.finalize("success")
    assert capsys.readouterr().out.count(f"warning: {kind.__name__} cannot write, the run goes on: ") == 1
    if kind is JSONLLogger:
        logged = {json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()}
    else:
        logged = {scalar.step for scalar in read(tmp_path).Scalars("loss")}
    assert set(range(1, 25)) <= logged and set(range(81, 101)) <= logged


def test_a_line_that_a_kill_cut_is_gone_before_the_next_and_nan_is_json(tmp_path):
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"loss": math.nan}, 1, 0)
    with logger.path.open("a") as file:
        file.write('{"step": 2, "epo')
    logger.log_metrics({"loss": 0.5}, 2, 0)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in logger.path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, None), (2, 0.5)]


def test_a_damaged_line_ends_what_a_resumed_run_keeps(tmp_path):
    logger = JSONLLogger(tmp_path)
    logger.path.write_bytes(b'{"step": 1}\n[2]\n\xff\n{"step": 3}\n')
    logger.rewind(None, 3)
    assert logger.path.read_bytes() == b'{"step": 1}\n'
