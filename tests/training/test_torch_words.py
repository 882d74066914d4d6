"""Names of torch's that MLX does not have: a note says what to write, while a module is made and in a run."""

import inspect
import re

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlxmm import Callback, Module, Trainer
from mlxmm.training import torch_words

PACKAGES = {"mlx.nn": nn, "mlx.core": mx, "mlx.optimizers": optim}


def note(error) -> str:
    [told] = error.value.__notes__
    return told


def made(line: str):
    scope = {"Module": Module, "nn": nn, "mx": mx, "optim": optim}
    exec(f"class Net(Module):\n    def __init__(self):\n        super().__init__()\n        {line}", scope)
    return scope["Net"]()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("self.flat = nn.Flatten()", "mlxmm: write mx.flatten(x, 1) where the layers are called."),
        ("self.loss = nn.CrossEntropyLoss()", "mlxmm: write nn.losses.cross_entropy(logits, labels, ...) with"),
        ("self.scale = nn.Parameter(mx.randn(3))", "mlxmm: write the array itself, self.scale = "),
        (
            "self.layer = nn.Linear(in_features=3, out_features=1)",
            "mlxmm: MLX has input_dims= in place of in_features=",
        ),
        ("self.x = nn.Linear(2, 2).state_dict()", "mlxmm: write dict(mlx.utils.tree_flatten(part.parameters()))."),
    ],
)
def test_what_a_constructor_says_in_torchs_words_gets_a_note(line, told):
    with pytest.raises((AttributeError, TypeError)) as error:
        made(line)
    assert note(error).startswith(told)


def test_freezing_by_requires_grad_gets_a_note():
    with pytest.raises(AttributeError) as error:
        made("self.a = nn.Linear(2, 2)\n        for p in self.a.parameters(): p.requires_grad = False")
    assert note(error) == "mlxmm: parameters() is a dict of arrays: write part.freeze(), or part.unfreeze()."


def test_an_argument_of_the_modules_own_gets_no_note():
    with pytest.raises(TypeError) as error:
        type(made("pass"))(dim=3)
    assert not hasattr(error.value, "__notes__")


def test_a_module_shows_the_signature_of_its_constructor():
    class Sized(Module):
        def __init__(self, size: int = 3): ...

    assert str(inspect.signature(Sized)) == "(size: int = 3)"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_that_is_answered_is_not_in_mlx_and_every_name_to_write_is(package):
    for name, told in torch_words.PACKAGES[package].items():
        assert not hasattr(PACKAGES[package], name), name
        for path in re.findall(r"\b((?:mx|nn|optim)(?:\.\w+)+)", told):
            first, *rest = path.split(".")
            owner = {"mx": mx, "nn": nn, "optim": optim}[first]
            for part in rest:
                owner = getattr(owner, part)


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch):
        return {"loss": mx.square(self.layer(batch["x"])).mean()}

    def configure_optimizers(self):
        return optim.Adam(learning_rate=0.1)


class TorchSchedule(Net):
    def configure_optimizers(self):
        return optim.lr_scheduler.ReduceLROnPlateau(optim.Adam(learning_rate=0.1))


BATCHES = [{"x": mx.ones((4, 2))}] * 2
QUIET = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False}


def test_a_schedule_of_torchs_gets_a_note_that_names_both_kinds():
    with pytest.raises(AttributeError) as error:
        Trainer(max_steps=1, enable_checkpointing=False, **QUIET).fit(TorchSchedule(), BATCHES)
    assert "trainer.estimated_stepping_batches" in note(error) and "ReduceLROnPlateau is a callback" in note(error)


class Plateau(Callback):
    def on_validation_end(self, trainer, module, metrics):
        trainer.optimizer.learning_rate = 0.1 * trainer.optimizer.learning_rate


def test_a_callback_that_lowers_the_rate_does_so_in_a_resumed_run_too(tmp_path):
    def fit(folder, epochs, ckpt_path=None):
        net = Net()
        net.layer.weight, net.layer.bias = mx.ones((1, 2)), mx.zeros(1)
        trainer = Trainer(max_epochs=epochs, callbacks=[Plateau()], default_root_dir=tmp_path / folder, **QUIET)
        trainer.fit(net, BATCHES, BATCHES, ckpt_path=ckpt_path)
        return trainer.optimizer.learning_rate.item(), net.layer.weight.tolist()

    whole = fit("whole", 3)
    fit("parts", 1)
    assert fit("parts", 3, "last") == whole and whole[0] == pytest.approx(1e-4)
