"""Module: a network, its loss and its optimizer, in one object that a Trainer fits."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm.config import UserError, to_json


class Module(nn.Module):
    """What a `Trainer` fits: Lightning's `LightningModule` on MLX.

    Steps take a batch, a tree of arrays, and return a dict of scalar means with "loss" among them and, where
    examples count differently, their "weight" (examples, or supervised tokens). They are compiled: they run as
    Python once per batch shape, so they return what they measure and keep no record of their own.

    Any hook of `Callback` may be a method of a module too, without `trainer` and `module`: `on_train_start(self)`.
    """

    trainer = None  # the Trainer that fits this module, while it does

    @property
    def hparams(self) -> dict:
        """The settings that loggers write: those of `config`, where the module has one."""
        config = vars(self).get("config")
        return to_json(config) if attrs.has(type(config)) else {}

    def training_step(self, batch) -> dict[str, mx.array]:
        """The loss of one batch, and what else is worth a curve."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def validation_step(self, batch) -> dict[str, mx.array]:
        """What to measure on one validation batch; `training_step`, unless a module measures more."""
        return self.training_step(batch)

    def test_step(self, batch) -> dict[str, mx.array]:
        """What to measure on one test batch; `validation_step`, unless a module measures more."""
        return self.validation_step(batch)

    def predict_step(self, batch):
        """What `Trainer.predict` collects for one batch: anything. Not compiled."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_step")

    def configure_callbacks(self) -> list:
        """Callbacks of the module's own; they replace the trainer's of the same class."""
        return []

    def configure_optimizers(self):
        """The `mlx.optimizers.Optimizer` of the parameters that are trainable now."""
        raise NotImplementedError(f"{type(self).__name__} has no configure_optimizers")

    def parameter_groups(self) -> dict[str, list[str]]:
        """Parameters, by their dotted names, that a `FreezeSchedule` may name together: {"lora": [...]}."""
        return {}

    def after_update(self) -> None:
        """Keep parameters within bounds: called inside the compiled update, after the optimizer."""

    def save_config(self, folder: Path) -> None:
        """Write beside the weights of a checkpoint what `from_pretrained` needs to read them."""


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and afterwards back on exactly where it was on."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part._training = mode  # `train(mode)` would set the parts below it too


class Modes:
    """What a compiled step captured and never looks at again: what is frozen, and who is in training mode."""

    def __init__(self, module: nn.Module):
        self._parts = [(part, part.training, frozenset(part._no_grad)) for part in module.modules()]

    def changed(self) -> bool:
        """Whether a step compiled at the time of this snapshot would no longer do what the module says."""
        return any(part._training is not mode or part._no_grad != frozen for part, mode, frozen in self._parts)


def trainable_names(module: nn.Module) -> list[str]:
    """The dotted names of the parameters that receive gradients."""
    return [name for name, _ in tree_flatten(module.trainable_parameters())]


def set_trainable(module: nn.Module, names: Iterable[str]) -> None:
    """Make the named parameters trainable and freeze all others."""
    wanted = set(names)
    for prefix, part in module.named_modules():
        own = [key for key, value in part.items() if isinstance(value, mx.array)]
        part.freeze(recurse=False)
        part.unfreeze(recurse=False, keys=[key for key in own if f"{prefix}.{key}".lstrip(".") in wanted])


def is_quantized(part: nn.Module) -> bool:
    """Whether this layer's own weights are packed integers, which have no gradients."""
    return "scales" in part


def match_parameters(module: nn.Module, pattern: str) -> list[str]:
    """The names of the parameters under `pattern` that can be trained: dotted, layers by Python slices.

    "projector", "language_model.model.layers[-2:]", "vision.layers[0].mlp"; or one of the module's
    `parameter_groups`, "lora". What is quantized cannot be trained. Raises `UserError` when there are none.
    """
    groups = module.parameter_groups() if isinstance(module, Module) else {}
    expression = re.compile(_expand(module, pattern) + r"(\.|$)")
    packed = tuple(f"{prefix}." for prefix, part in module.named_modules() if is_quantized(part))
    found = groups.get(pattern) or filter(expression.match, (name for name, _ in tree_flatten(module.parameters())))
    names = [name for name in found if not name.startswith(packed)]
    if not names:
        parts = ", ".join(sorted({*module.children(), *groups}))
        raise UserError(f"{pattern!r} names no parameter to train in {type(module).__name__}, whose parts are {parts}")
    return names


def _expand(module: nn.Module, pattern: str) -> str:
    """`pattern` as a regular expression, its slices as the layers they choose."""
    expression, part = "", module
    for word in re.findall(r"[^.\[\]]+|\[[^\]]*\]", pattern):
        if not word.startswith("["):
            expression += ("\\." if expression else "") + re.escape(word)
            part = part.get(word, {}) if isinstance(part, dict) else {}
            continue
        chosen = _choose(word[1:-1], len(part))
        expression += rf"\.({'|'.join(map(str, chosen)) or 'none'})"
        part = part[chosen[0]] if chosen else {}
    return expression


def _choose(index: str, length: int) -> list[int]:
    """The positions that "-2:", "3" or "::2" choose out of `length`."""
    try:
        numbers = [int(number) if number else None for number in index.split(":")]
        chosen = range(length)[slice(*numbers) if len(numbers) > 1 else numbers[0]]
    except (ValueError, TypeError, IndexError):
        raise UserError(f"[{index}] is no index or slice of {length} layers") from None
    return [chosen] if isinstance(chosen, int) else list(chosen)
