"""Errors of a step: what its author can put right is a `UserError`, one line that says what to write."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from numbers import Number

import mlx.core as mx

from mlxmm.errors import UserError, as_one
from mlxmm.training import lightning_words, mlx_errors, module_source, unknown_names
from mlxmm.training.module import Module


@contextlib.contextmanager
def explained(step: Callable, batch) -> Iterator[None]:
    """Within the block, errors of a step that its author can put right are `UserError`; those of MLX get a note."""
    with _told_together(step), _translated(step, batch), mlx_errors.noted(batch):
        yield


@contextlib.contextmanager
def _told_together(step: Callable) -> Iterator[None]:
    """Within the block, a `UserError` tells of all that the source of the step's module says in Lightning's words."""
    try:
        yield
    except UserError as error:
        module = getattr(step, "__self__", None)
        words = module_source.words_of_lightning(module) if isinstance(module, Module) else []
        if not set(words) <= {str(error)}:
            error.faults = list(dict.fromkeys([str(error), *words]))
            error.args = (as_one(error.faults),)
        raise


@contextlib.contextmanager
def _translated(step: Callable, batch) -> Iterator[None]:
    try:
        yield
    except AttributeError as error:
        name = re.search(r"'array' object has no attribute '(\w+)'", str(error))
        if name is None or name[1] not in lightning_words.TENSORS:
            raise
        raise unknown_names.missing("an array of MLX", name[1], lightning_words.TENSORS) from error
    except TypeError as error:
        if isinstance(batch, list) and "list indices must be integers" in str(error):
            data = getattr(step, "__name__", "").removesuffix("_step").replace("idation", "").replace("ing", "")
            told = "a stage has one loader, not a list of them"
            raise UserError(f"{_name_of(step)} got a list as its batch of the {data} data: {told}") from error
        raise
    except ValueError as error:
        if "during function transformations" not in str(error):
            raise
        told = lightning_words.READS_A_NUMBER
        raise UserError(f"{_name_of(step)} reads a number out of an array (.item(), float, if): {told}") from error


def check_outputs(step: Callable, outputs, *, needs_loss: bool) -> dict:
    """What a step returned, if it is a dict of numbers."""
    name = _name_of(step)
    if not isinstance(outputs, Mapping):
        what = 'return {"loss": loss}' if isinstance(outputs, mx.array) else 'it returns a dict, {"loss": loss}'
        raise UserError(f"{name} returned {_described(outputs)}: {what}")
    if needs_loss and "loss" not in outputs:
        raise UserError(f'{name} returned no "loss", only {", ".join(map(str, outputs))}: add "loss": loss')
    for key, value in outputs.items():
        if not isinstance(value, Number) and not (isinstance(value, mx.array) and value.ndim == 0):
            raise UserError(f"{name} returned {_described(value)} as {key!r}: a metric is one number, such as x.mean()")
    return dict(outputs)


def check_same_names(total: Mapping, sums: Mapping) -> None:
    """That a step returned the same metrics for this batch as for those before: all are divided by one weight."""
    if some := sorted(total.keys() ^ sums.keys()):
        raise UserError(f"a step returned {some[0]!r} for one batch and not for another: return it for every batch")


def _name_of(step: Callable) -> str:
    """The name of the step that its author wrote: a module validates by its training_step if it has no other."""
    name, module = getattr(step, "__name__", "the step"), getattr(step, "__self__", None)
    for other, base in (("test_step", "validation_step"), ("validation_step", "training_step")):
        if name == other and getattr(type(module), name, None) is getattr(Module, name):
            name = base
    return name


def _described(value) -> str:
    if isinstance(value, mx.array):
        return f"an array of shape {value.shape}" if value.ndim else "a bare array"
    return "nothing" if value is None else f"a {type(value).__name__}"
