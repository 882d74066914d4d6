"""Settings and callbacks given a value of another type, or out of bounds: one line that names both, before any work."""

import math
import os
import signal
import subprocess
import sys

import attrs
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression

from callbacks import (
    CachedFeatures,
    EarlyStopping,
    EMAWeightAveraging,
    FreezeSchedule,
    ModelCheckpoint,
    ThroughputMonitor,
    Timer,
)
from mlxmm import TrainerConfig, seed_everything
from mlxmm.config import checked
from mlxmm.errors import UserError
from mlxmm.modules.contrastive_clip import CLIPConfig
from mlxmm.networks.generation import GenerationConfig
from mlxmm.optimizers import OptimizerConfig

WRONG = {
    lambda: TrainerConfig(max_steps="10"): "TrainerConfig(max_steps=...): '10' is not of type int",
    lambda: TrainerConfig(compile=1): "TrainerConfig(compile=...): 1 is not of type bool",
    lambda: CLIPConfig(projection_dim=True): "CLIPConfig(projection_dim=...): True is not of type int",
    lambda: ModelCheckpoint(monitor=3): "ModelCheckpoint(monitor=...): 3 is not of type str or None",
    lambda: ModelCheckpoint(save_top_k="all"): "ModelCheckpoint(save_top_k=...): 'all' is not of type int",
    lambda: ModelCheckpoint(mode="maximum"): "ModelCheckpoint: 'mode' must be in ('min', 'max') (got 'maximum')",
    lambda: EarlyStopping("val/loss", patience=-1): "EarlyStopping: 'patience' must be >= 0: -1",
    lambda: EarlyStopping("val/loss", patience="3"): "EarlyStopping(patience=...): '3' is not of type int",
    lambda: EMAWeightAveraging("0.9"): "EMAWeightAveraging(decay=...): '0.9' is not of type float",
    lambda: Timer(3): "Timer(duration=...): 3 is not of type str or None",
    lambda: ThroughputMonitor("x"): "ThroughputMonitor(batch_size_fn=...): 'x' is not of type Callable",
    lambda: FreezeSchedule(["head"]): "FreezeSchedule(stages=...): ['head'] is not of type Mapping",
    lambda: FreezeSchedule({"a": "head"}): (
        "FreezeSchedule needs {epoch or update: parts}, like {0: 'projector'}: {'a': 'head'}"
    ),
    lambda: TrainerConfig(max_steps=10**400): (
        "TrainerConfig(max_steps=...): a number of more than 64 bits is too large"
    ),
    lambda: OptimizerConfig(learning_rate=math.inf): ("OptimizerConfig(learning_rate=...): inf is not a finite number"),
    lambda: GenerationConfig(temperature=math.nan): "GenerationConfig(temperature=...): nan is not a finite number",
    lambda: GenerationConfig(num_beams=10**9): "GenerationConfig: 'num_beams' must be <= 1000: 1000000000",
    lambda: seed_everything(-1): "a seed is an integer from 0 to 2**64 - 1: -1",
    lambda: seed_everything("x"): "a seed is an integer from 0 to 2**64 - 1: 'x'",
}


@pytest.mark.parametrize(("call", "told"), WRONG.items(), ids=WRONG.values())
def test_a_wrong_value_is_named_with_its_setting(call, told):
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value) == told


def test_numbers_of_numpy_and_integers_for_floats_are_taken():
    assert EarlyStopping("val/loss", patience=np.int64(3), min_delta=0).patience == 3
    assert EMAWeightAveraging(np.float32(0.5)).decay == 0.5


def test_fields_that_are_no_arguments_and_types_that_are_not_plain_are_left_alone():
    @attrs.define(field_transformer=checked)
    class Part:
        names: list[str]
        count: int = attrs.field(default="none yet", init=False)

    assert Part(("a", "b")).count == "none yet"


def test_cached_features_of_a_module_without_a_tower_are_refused(make_trainer, tmp_path):
    with pytest.raises(UserError, match="needs a captioner with a part 'vision', and a CaptionData"):
        make_trainer(callbacks=[CachedFeatures(tmp_path)]).fit(TinyRegression(), DistinctBatches())


def test_a_key_that_the_batch_does_not_have_comes_with_those_that_it_has(make_trainer):
    class Other(TinyRegression):
        def training_step(self, batch):
            return {"loss": batch["image"].mean()}

    with pytest.raises(KeyError) as error:
        make_trainer().fit(Other(), DistinctBatches())
    assert error.value.__notes__ == ["The batch holds 'x', 'y', 'mask'."]


SCRIPT = """
import os, signal
import mlx.core as mx
import mlx.optimizers as optim
from mlxmm import Callback, Module, Trainer

class Scale(Module):
    def __init__(self):
        super().__init__()
        self.scale = mx.array(1.0)
    def training_step(self, batch):
        return {"loss": mx.square(self.scale * batch["x"]).mean()}
    def configure_optimizers(self):
        return optim.SGD(learning_rate=0.1)

class Stop(Callback):
    def on_train_batch_end(self, trainer, module, metrics, batches):
        os.kill(os.getpid(), signal.SIGINT)

Trainer(max_epochs=1, logger=False, callbacks=[Stop()]).fit(Scale(), [{"x": mx.ones(2)}] * 9)
"""


def test_a_script_that_is_interrupted_says_what_it_kept(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    kept = "runs/Scale/version_0/checkpoints/step=1"
    assert ended.stdout.splitlines()[-1] == f"interrupted: kept {kept}; fit(..., ckpt_path='last') goes on from there"
