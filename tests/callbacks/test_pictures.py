"""Callbacks that log pictures, distributions and marks."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from small_clip import pairs, small_clip

from callbacks import (
    EmbeddingProjector,
    FreezeSchedule,
    GradientHistograms,
    SimilarityMatrix,
    SyntheticRefresh,
    WeightHistograms,
    ZeroShotEvaluation,
)
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar
from mlxmm.training.datamodule import DataModule
from mlxmm.training.logger import Logger

ROWS = ShapesGrammar(ShapesConfig(image_size=16), 0).rows(0)["val"]


class Kept(Logger):
    """Keeps what it is given, by kind."""

    def __init__(self):
        self.metrics, self.images, self.texts, self.histograms, self.embeddings = [], [], [], [], []

    def log_metrics(self, metrics, step, epoch):
        self.metrics += [(name, value, step) for name, value in metrics.items()]

    def log_images(self, name, images, step):
        self.images.append((name, images.shape, images.dtype, step))

    def log_text(self, name, text, step):
        self.texts.append((name, text, step))

    def log_histogram(self, name, values, step):
        self.histograms.append((name, values, step))

    def log_embedding(self, *arguments):
        self.embeddings.append(arguments)


@pytest.fixture
def kept(make_trainer):
    """Trains a small CLIP, or another module, with callbacks; returns what they logged."""

    def run(*callbacks, module=None, **settings):
        logger = Kept()
        trainer = make_trainer(
            callbacks=callbacks, logger=logger, **{"max_steps": 4, "val_check_interval": 2} | settings
        )
        clip = [pairs(8)] * 4, [pairs(8, 1)]
        trainer.fit(*([small_clip(), *clip] if module is None else module))
        return logger

    return run


def test_similarities_of_pairs_are_one_picture_at_each_validation(kept):
    logger = kept(SimilarityMatrix(ROWS, num_samples=4))
    [(name, first, dtype, _), (_, second, *_)] = logger.images
    assert name == "val/similarity" and first == second and first[0] == 1 and first[3] == 3 and dtype == np.uint8
    assert [step for *_, step in logger.images] == [2, 4]


def test_looking_changes_no_update(kept):
    losses = []
    for callbacks in ([], [SimilarityMatrix(ROWS), EmbeddingProjector(ROWS, num_samples=4)]):
        logger = kept(*callbacks, log_every_n_steps=1)
        losses.append([value for name, value, _ in logger.metrics if name == "train/loss"])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_classes_that_are_taken_for_others_are_a_picture_unless_they_are_too_many(kept):
    images, labels = [ROWS[i]["image"] for i in range(4)], ["cat", "dog"] * 2
    logger = kept(ZeroShotEvaluation(images, labels, name="val/zero_shot"))
    assert [name for name, *_ in logger.images] == ["val/zero_shot/confusion"] * 2
    assert ("val/zero_shot/top1_chance", 0.5, 4) in logger.metrics
    many = ["cat", "dog", *(f"class {i}" for i in range(100))]
    assert kept(ZeroShotEvaluation(images, labels, many), max_steps=2).images == []


def test_embeddings_are_those_of_pictures_then_of_captions(kept):
    logger = kept(EmbeddingProjector(ROWS, num_samples=3))
    [(name, vectors, columns, labels, images, step)] = logger.embeddings
    assert name == "embeddings" and vectors.shape == (6, 12) and columns == ("kind", "caption") and step == 4
    assert labels[0] == ("picture", ROWS[0]["captions"][0]) and labels[3] == ("caption", ROWS[0]["captions"][0])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert images.shape == (6, 48, 48, 3) and images.dtype == np.uint8 and (images[3:] >= images[:3]).all()


def test_histograms_are_of_weights_after_an_update_and_of_its_gradients(kept):
    module = TinyRegression()
    histograms = WeightHistograms(2), GradientHistograms(2)
    logger = kept(*histograms, module=[module, DistinctBatches()], max_steps=5)
    names = [f"{kind}/{part}" for kind in ("weights", "gradients") for part in ("backbone.weight", "head.bias")]
    steps = {name: [step for told, _, step in logger.histograms if told == name] for name in names}
    assert steps == dict.fromkeys(names, [2, 4])
    told = {name: values for name, values, step in logger.histograms if step == 4}
    assert told["weights/backbone.weight"].shape == told["gradients/backbone.weight"].shape == (8, 4)


def test_histograms_of_half_precision_and_of_what_is_trainable_only(kept):
    module = TinyRegression()
    callbacks = [WeightHistograms(1), GradientHistograms(1), FreezeSchedule({0: "head"})]
    logger = kept(*callbacks, module=[module, DistinctBatches()], max_steps=1, precision="bf16-true", compile=False)
    assert module.head.weight.dtype == mx.bfloat16
    assert {name for name, *_ in logger.histograms} == {
        f"{kind}/head.{part}" for kind in ("weights", "gradients") for part in ("weight", "bias")
    }


@pytest.mark.parametrize("unit, opened", [("epoch", 1), ("step", 6)])
def test_a_freeze_schedule_marks_where_parts_are_opened(kept, unit, opened):
    schedule = FreezeSchedule({0: "head", opened: ("head", "backbone")}, unit=unit)
    settings = {"max_steps": 12, "log_every_n_steps": 3, "val_check_interval": 1.0}
    logger = kept(schedule, module=[TinyRegression(), DistinctBatches()], **settings)
    trained = [(value, step) for name, value, step in logger.metrics if name == "schedule/num_trainable"]
    assert trained == [(9, 3), (9, 6), (49, 9), (49, 12)]
    assert logger.texts == [
        ("schedule/trainable", f"from {unit} 0: head", 0),
        ("schedule/trainable", f"from {unit} {opened}: head, backbone", 6),
    ]


def test_new_rows_are_marked_by_the_epoch_they_were_made_for(kept):
    class Data(DataModule):
        def train_dataloader(self):
            return DistinctBatches()

        def replace_rows(self, split, rows):
            pass

    refresh = SyntheticRefresh(lambda epoch: [epoch], every_n_epochs=2)
    logger = kept(refresh, module=[TinyRegression(), Data()], max_steps=18, val_check_interval=1.0)
    assert [told for told in logger.metrics if told[0].startswith("refresh")] == [
        ("refresh/epoch", 0, 0),
        ("refresh/epoch", 0, 6),
        ("refresh/epoch", 2, 12),
    ]
