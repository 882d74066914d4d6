"""SyntheticRefresh with captions by the module in training: killed anywhere and resumed, a run ends as it would."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_captioner import make

from callbacks import ModelCheckpoint, SyntheticRefresh
from mlxmm import Trainer
from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.own_writer import TrainingWriter
from mlxmm.captioners.refresh import CaptionRefresh
from mlxmm.captioners.refresh_folder import RefreshFolder
from mlxmm.compute.deterministic import repeats_to_the_bit
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint

SHAPES = ShapesConfig(image_size=16, num_train=16, num_val=8, num_test=4)


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does."""


def fit(folder, resume=False, **settings):
    """Four epochs of two updates, with new captions for half of the pictures before each but the first, and a
    checkpoint every third update."""
    module = make(dropout=0.1)
    source = open_source(CaptionDataConfig(shapes=SHAPES, batch_size=8), 0)
    writer = TrainingWriter(module, batch_size=4)
    sampling = Sampling(temperature=1.0, max_tokens=3)
    refresh = CaptionRefresh(folder / "refresh", source.rows["train"], writer, {"none": ""}, sampling)
    trainer = Trainer(
        **({"max_epochs": 4, "log_every_n_steps": 1} | settings),
        deterministic=not repeats_to_the_bit(mx.default_device(), deterministic=False),
        default_root_dir=folder,
        limit_val_batches=0,
        callbacks=[SyntheticRefresh(refresh), ModelCheckpoint(every_n_train_steps=3)],
    )
    last = checkpoint.latest(folder / "checkpoints") if resume else None
    trainer.fit(module, CaptionData(source, transform=module.transform), ckpt_path=last)
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def metrics(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(folder), metrics(folder), folder


def test_each_version_is_logged_and_named_in_the_checkpoints(whole):
    _, rows, folder = whole
    starts = [row for row in rows if "refresh/version" in row]
    assert [(row["step"], row["refresh/version"]) for row in starts] == [(0, 0), (2, 1), (4, 2), (6, 3)]
    assert all(row["refresh/made"] == 16 and row["refresh/failed"] == 0 for row in starts[1:])
    state = checkpoint.read_state(checkpoint.latest(folder / "checkpoints"))["callbacks"]["SyntheticRefresh"]
    assert state == {"epoch": 3, "version": 3, "sha256": RefreshFolder(folder / "refresh").digest(3)}


def killed_at(owner, name, call, after):
    """`owner.name`, which kills the run at this call, before it or after it."""
    real, calls = getattr(owner, name), []

    def method(self, *args):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = real(self, *args)
        if len(calls) == call and after:
            raise Killed
        return result

    return method


MOMENTS = {
    "in the first batch of captions": (TrainingWriter, "write", 1, False),
    "between batches of captions": (TrainingWriter, "write", 6, False),
    "in the last batch of a version": (TrainingWriter, "write", 4, True),
    "before a version is complete": (RefreshFolder, "finish", 2, False),
    "between a version and the schedule": (RefreshFolder, "finish", 2, True),
    "once the epoch is scheduled": (RefreshFolder, "schedule", 3, True),
    "in the middle of an epoch": (SyntheticRefresh, "on_train_batch_end", 4, True),
    "before the first checkpoint": (SyntheticRefresh, "on_train_batch_end", 2, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_and_resumed_ends_as_one_never_stopped(whole, moment, tmp_path, monkeypatch):
    owner, name, call, after = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed_at(owner, name, call, after))
        with pytest.raises(Killed):
            fit(tmp_path)
    if not list((tmp_path / "checkpoints").glob("step=*")):
        (tmp_path / "metrics.jsonl").unlink()  # as open_run does
    weights = fit(tmp_path, resume=True)
    for name, array in whole[0].items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    assert metrics(tmp_path) == whole[1]


def test_a_run_whose_version_was_lost_is_not_resumed(whole, tmp_path):
    fit(tmp_path, max_epochs=3)
    (tmp_path / "refresh/version-2/complete.json").unlink()
    with pytest.raises(UserError, match="version-2/complete.json is not there"):
        fit(tmp_path, resume=True)


def test_samples_of_a_new_version_go_to_the_loggers(tmp_path):
    from mlxmm.training.loggers import Logger

    class Kept(Logger):
        images, texts = [], []

        def log_images(self, name, images, step):
            self.images.append((name, images.shape, step))

        def log_text(self, name, text, step):
            self.texts.append((name, text, step))

    fit(tmp_path, max_epochs=2, logger=Kept())
    assert Kept.images == [("refresh/samples", (8, 16, 16, 3), 2)]
    [(name, text, step)] = Kept.texts
    assert name == "refresh/samples" and step == 2
    assert text.startswith("|  | old | new |") and len(text.splitlines()) == 10
