"""CachedFeatures: a frozen tower runs once; its features are read from then on, and never when they are stale."""

import attrs
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_sources import write_source
from test_captioner import make

from callbacks import CachedFeatures, FreezeSchedule, SyntheticRefresh, cached_features
from mlxmm import Trainer
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources import shapes
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.errors import UserError

SHAPES = ShapesConfig(image_size=16, num_train=64, num_val=16, num_test=4)


@pytest.fixture
def drawn(monkeypatch):
    """Counts the pictures that are drawn: reading one costs that."""
    count, draw = [], shapes.draw
    monkeypatch.setattr(shapes, "draw", lambda *args: count.append(1) or draw(*args))
    return count


def fit(*callbacks, module=None, max_epochs=3, random_crop=False, **settings):
    module = module or make(**settings)
    config = CaptionDataConfig(shapes=SHAPES, batch_size=16, random_crop=random_crop)
    data = CaptionData(open_source(config, 0), transform=module.transform)
    trainer = Trainer(
        max_epochs=max_epochs, logger=False, enable_checkpointing=False, callbacks=callbacks, num_sanity_val_steps=0
    )
    trainer.fit(module, data)
    return module, data, trainer


def weights(module) -> dict:
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def test_training_on_kept_features_is_training_on_pictures_up_to_float16(tmp_path):
    plain, _, trainer = fit()
    kept, data, again = fit(CachedFeatures(tmp_path))
    assert again.callback_metrics["val/loss"] == pytest.approx(trainer.callback_metrics["val/loss"], rel=1e-2)
    for name, array in weights(plain).items():
        np.testing.assert_allclose(array, weights(kept)[name], atol=0.02, err_msg=name)
    assert "image" in data.rows["train"][0]  # pictures are back


def test_pictures_are_read_once_and_in_a_second_run_hardly_at_all(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(
        shapes.ShapesRows, "without_image", lambda self, i: {"captions": ["a red square"], "id": str(i)}
    )
    fit(CachedFeatures(tmp_path))
    first = len(drawn)
    assert first <= 64 + 16 + 4  # and one more of each split, for the features' shape, each time they are opened
    drawn.clear()
    fit(CachedFeatures(tmp_path))
    assert len(drawn) <= 4


@pytest.mark.parametrize("change", ["weights", "layer", "pictures", "preprocessing", "decoder"])
def test_what_is_stale_is_computed_again(tmp_path, change, monkeypatch):
    fit(CachedFeatures(tmp_path), max_epochs=1)
    before = set(tmp_path.iterdir())
    module = make(layer=0 if change == "layer" else -1)
    if change == "weights":
        module.vision.embeddings.class_embedding = module.vision.embeddings.class_embedding + 1e-3
    if change == "preprocessing":
        module.processor = attrs.evolve(module.processor, mean=(0.5, 0.5, 0.5))
    if change == "decoder":
        monkeypatch.setattr(cached_features, "DECODER", "another version", raising=False)
    data = CaptionData(
        open_source(CaptionDataConfig(shapes=SHAPES, batch_size=16), int(change == "pictures")),
        transform=module.transform,
    )
    Trainer(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[CachedFeatures(tmp_path)]).fit(
        module, data
    )
    assert len(set(tmp_path.iterdir()) - before) == 2  # of training and of validation


def test_a_tower_that_is_opened_between_epochs_reads_pictures_again_and_learns(tmp_path):
    schedule = FreezeSchedule({0: "network", 1: ("network", "vision")})
    module, _, _ = fit(schedule, CachedFeatures(tmp_path), max_epochs=2)
    start = weights(make())
    moved = {name for name, array in weights(module).items() if not np.array_equal(array, start[name])}
    assert "vision.embeddings.patch_embedding.weight" in moved


def test_a_tower_that_is_opened_within_an_epoch_is_refused(tmp_path):
    schedule = FreezeSchedule({0: "network", 2: ("network", "vision")}, unit="step")
    with pytest.raises(UserError, match="vision was unfrozen within an epoch"):
        fit(schedule, CachedFeatures(tmp_path))


def test_random_crops_are_refused(tmp_path):
    with pytest.raises(UserError, match="random_crop shows other pixels"):
        fit(CachedFeatures(tmp_path), random_crop=True)


def test_a_learned_mix_of_layers_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be cached with mix_layers"):
        fit(CachedFeatures(tmp_path), mix_layers=True)


@pytest.mark.parametrize("refresh_first", [True, False])
def test_new_rows_get_features_of_their_own_whichever_callback_comes_first(tmp_path, refresh_first):
    module, reached = make(), []
    source = open_source(CaptionDataConfig(shapes=SHAPES, batch_size=16), 0)

    def transform(row, caption):
        reached.append((row["id"], np.array(row["features"]) if "features" in row else None))
        return module.transform(row, caption)

    data = CaptionData(source, transform=transform)
    callbacks = [SyntheticRefresh(source.fresh_rows), CachedFeatures(tmp_path, splits=("train",))]
    callbacks = callbacks if refresh_first else callbacks[::-1]
    Trainer(max_epochs=3, logger=False, enable_checkpointing=False, callbacks=callbacks).fit(
        module, train_dataloaders=None, datamodule=NoValidation(data)
    )
    assert {name for name, _ in reached} == {f"train-{epoch}-{i}" for epoch in range(3) for i in range(64)}
    for name, features in reached[::16]:
        epoch, place = map(int, name.split("-")[1:])
        image = source.fresh_rows(epoch)[place]["image"]
        expected = np.array(module.features(module.processor([image]))[0])
        np.testing.assert_allclose(features, expected, atol=2e-3, err_msg=name)
    assert "image" in data.rows["train"][0] and data.rows["train"].epoch == 2  # images are back, those of the last rows


class NoValidation:
    """A CaptionData that trains only: its transform checks training rows."""

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, name)

    def val_dataloader(self):
        return None


def test_a_weighted_mixture_trains_on_kept_features_as_on_pictures(tmp_path):
    other = write_source(tmp_path / "other.parquet", range(20), "a red square")
    config = CaptionDataConfig(source=("shapes", other), weights=(1, 0.5), shapes=SHAPES, batch_size=16)

    def trained(*callbacks):
        module = make()
        data = CaptionData(open_source(config, 0), transform=module.transform)
        Trainer(max_epochs=2, logger=False, callbacks=callbacks, num_sanity_val_steps=0).fit(module, data)
        return weights(module)

    plain, kept = trained(), trained(CachedFeatures(tmp_path / "kept"))
    for name, array in plain.items():
        np.testing.assert_allclose(array, kept[name], atol=0.02, err_msg=name)
