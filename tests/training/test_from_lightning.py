"""docs/from-lightning.md is true: what is the same runs, and what differs is answered with the line on the page."""

import copy
import re
from datetime import timedelta
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

import mlxmm
from mlxmm import Callback, DataModule, Module, Trainer, callbacks
from mlxmm.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs/from-lightning.md").read_text()


class Net(Module):
    def __init__(self, hidden_size: int = 8):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, hidden_size), nn.Linear(hidden_size, 1)

    def loss(self, batch):
        return mx.square(self.head(nn.relu(self.encoder(batch["x"])))[:, 0] - batch["y"]).mean()

    def training_step(self, batch):
        return {"loss": self.loss(batch)}

    def predict_step(self, batch):
        return self.encoder(batch["x"])

    def configure_optimizers(self):
        return optim.Adam(1e-3)


class Data(DataModule):
    def train_dataloader(self):
        return batches(4)


class Torch:
    """Stands for an optimizer of torch."""


Torch.__module__, Torch.__name__ = "torch.optim.adam", "Adam"


def batches(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    shapes = {"x": (4, 4), "y": (4,)}
    return [{key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()} for _ in range(count)]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page."""
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    found = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [[cells[0].strip("`| "), cells[-1]] for cells in found]


OURS = {name: getattr(mlxmm, name) for name in mlxmm.__all__} | {
    name: getattr(callbacks, name) for name in callbacks.__all__
}


def names() -> dict:
    """What the lines of the page speak of."""
    best = callbacks.ModelCheckpoint(monitor="val/loss")
    trainer = Trainer(max_epochs=2, default_root_dir="run", **QUIET, callbacks=best)
    own = {"net": Net(), "loader": batches(4), "val_loader": batches(1), "data": Data(), "trainer": trainer}
    return OURS | own | {"mlxmm": mlxmm, "nn": nn, "copy": copy, "timedelta": timedelta, "Net": Net, "Data": Data}


QUIET = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
SAME = rows("What is the same")
CALLS = [
    *rows("Arguments of the Trainer"),
    *rows("Calls"),
    *rows("Attributes of the Trainer"),
    *rows("Arguments of callbacks and loggers"),
    *rows("Names of the package"),
]


def define(kind: str, method: str, body: str):
    """An instance of Net, Data or Callback with a method of this signature and body."""
    scope = {"module": Net, "datamodule": Data, "callback": Callback}
    scope |= {"torch_optimizer": Torch(), "mx": mx, "nn": nn, "optim": optim}
    indented = "\n".join(f"        {line}" for line in body.split("; "))
    exec(f"class Mine({kind}):\n    {method}:\n{indented}", scope)
    return scope["Mine"]()


def answer(call) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def fit(module, callback=None, data=None):
    trainer = Trainer(max_steps=2, **QUIET, enable_checkpointing=False, callbacks=callback)
    trainer.fit(module, data or batches(3))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", [line for line, _ in SAME])
@pytest.mark.filterwarnings("ignore:precision='16-mixed' trains in bfloat16")
def test_what_the_page_calls_the_same_runs(line):
    scope = names()
    if re.search("ckpt_path|load_from|trainer.c", line):  # these want a run that was there before
        scope["trainer"].fit(Net(), batches(4), batches(1))
    if "ckpt_path" in line:
        scope["trainer"] = Trainer(max_epochs=2, default_root_dir="run", **QUIET)
    assert (
        eval(line, scope) is not None
        or "fit" in line
        or line in ("trainer.logger", "seed_everything(42, workers=True)")
    )


@pytest.mark.parametrize(("line", "told"), CALLS)
def test_a_call_of_lightnings_is_answered_with_the_line_of_the_page(line, told):
    assert answer(lambda: eval(line, names())) == told


@pytest.mark.parametrize(("line", "told"), rows("In a step"))
def test_what_cannot_be_in_a_step_is_answered(line, told):
    body = f'loss, x = self.loss(batch), batch["x"]; {line}'
    body += "" if line.startswith("return") else '; return {"loss": loss}'
    assert answer(lambda: fit(define("module", "def training_step(self, batch)", body))) == told


@pytest.mark.parametrize(("line", "told"), rows("In `__init__` of a module"))
def test_what_cannot_be_in_the_constructor_is_answered(line, told):
    assert answer(lambda: fit(define("module", "def __init__(self)", f"module.__init__(self); {line}"))) == told


@pytest.mark.parametrize(("line", "told"), rows("In `configure_optimizers`"))
def test_what_is_no_optimizer_is_answered(line, told):
    assert answer(lambda: fit(define("module", "def configure_optimizers(self)", line))) == told


@pytest.mark.parametrize(("line", "told"), rows("Methods of a module"))
def test_a_method_of_a_module_that_nobody_would_call_is_answered(line, told):
    assert answer(lambda: fit(define("module", line, "pass"))) == told


@pytest.mark.parametrize(("line", "told"), rows("Methods of a callback"))
def test_a_hook_that_nobody_would_call_is_answered(line, told):
    assert answer(lambda: fit(Net(), define("callback", line, "pass"))) == told


@pytest.mark.parametrize(("line", "told"), rows("Methods of a datamodule"))
def test_a_method_of_a_datamodule_that_nobody_would_call_is_answered(line, told):
    assert answer(lambda: fit(Net(), data=define("datamodule", line, "pass"))) == told
