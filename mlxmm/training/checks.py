"""Checks of what a Trainer is given: each raises `UserError`, one line that says what to write."""

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlxmm.errors import Faults, UserError, warn
from mlxmm.training import lightning_words, module_source, trainer_arguments, unknown_names
from mlxmm.training.callback import HOOKS, Callback, overrides
from mlxmm.training.datamodule import DataModule, Loaders
from mlxmm.training.module import Module
from mlxmm.training.monitors import without_validation
from mlxmm.training.optimizer_groups import split_by_group
from mlxmm.training.trainer_config import TrainerConfig

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
NEEDED_BY_FIT = ("training_step", "configure_optimizers")
INDEX = {"on_train_batch_end": "; trainer.batch_idx counts the batches of the epoch that are done, this one included"}
AN_OPTIMIZER = "return one of mlx.optimizers, such as AdamW(learning_rate=1e-3)"


def checked_arguments(config: TrainerConfig, settings: dict, callbacks) -> tuple[TrainerConfig, list[Callback]]:
    """What a Trainer is made of, if it can be. Raises one `UserError` of all faults."""
    faults = Faults()
    with faults.noted():
        config = trainer_arguments.configured(config, settings)
    with faults.noted():
        callbacks = as_callbacks(callbacks)
    faults.refuse()
    return config, callbacks


def check_stage(trainer, stage: str, module, datamodule) -> None:
    """That `trainer` can run this stage, before anything is written."""
    if trainer.state == "running":
        own = f"Trainer(logger=False).{stage}(...)"
        raise UserError(f"{stage} within another stage of the same Trainer: give it one of its own, {own}")
    if module is None:
        raise UserError(f"{stage} has no module: give it one, or fit one before")
    check_is_module(module)
    faults = Faults()
    with faults.noted():
        check_module(module, stage)
    with faults.noted():
        check_datamodule(datamodule)
    if faults:  # or the source is not read
        faults.refuse(also=[*module_source.words_of_lightning(module), *_monitors_in_vain(trainer, stage, datamodule)])


def _monitors_in_vain(trainer, stage: str, datamodule) -> list[str]:
    """What callbacks will say of a monitor, as far as it is known before the data are opened."""
    validates = stage != "fit" or not isinstance(datamodule, Loaders) or datamodule.val is not None
    validates |= bool(trainer.config.overfit_batches or trainer.config.fast_dev_run)
    pairs = [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in trainer.callbacks]
    told = [without_validation(name, monitor, validates) for name, monitor in pairs if isinstance(monitor, str)]
    return [line for line in told if line]


def check_is_module(module) -> None:
    """That `module` is a Module, made by its own `__init__`."""
    kind = type(module).__name__
    if isinstance(module, type):
        raise UserError(f"{module.__name__} is a class: give a module, {module.__name__}(...)")
    if not isinstance(module, Module):
        raise UserError(f"{kind} is no mlxmm.Module: write `class My{kind}(mlxmm.Module)` with training_step")
    if "_no_grad" not in vars(module):
        raise UserError(f"{kind}.__init__ must begin with super().__init__()")


def check_module(module, stage: str) -> None:
    """That the methods of `module` are those that a stage needs, and are called as they expect."""
    kind, faults = type(module).__name__, Faults()
    if vars(module).get("automatic_optimization") is False:
        faults.append(str(unknown_names.missing(kind, "automatic_optimization", lightning_words.MODULE)))
    expected = {hook: _parameters(Callback, hook)[2:] for hook in HOOKS} | {step: ["batch"] for step in STEPS}
    with faults.noted():
        _check_methods(module, Module, expected, lightning_words.HOOKS_OF_MODULES)
    for name in NEEDED_BY_FIT if stage == "fit" else ():
        if getattr(type(module), name) is getattr(Module, name):
            faults.append(f"{kind} has no {name}, which fit needs: docs/write-a-module.md shows one")
    faults.refuse()


def as_callbacks(callbacks: Callback | Sequence[Callback] | None) -> list[Callback]:
    """One callback or several, whose hooks exist and are called as they expect, as a list."""
    callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [] if callbacks is None else [callbacks]
    faults = Faults()
    for callback in callbacks:
        with faults.noted():
            _check_callback(callback)
    faults.refuse()
    return callbacks


def _check_callback(callback) -> None:
    name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
    if isinstance(callback, type):
        raise UserError(f"{name} is a class: give a callback, {name}(...)")
    if not isinstance(callback, Callback):
        raise UserError(f"{name} is no callback: write `class {name}(mlxmm.Callback)`")
    faults = Faults()
    with faults.noted():
        _check_methods(callback, Callback, {}, lightning_words.HOOKS)
    for hook in filter(partial(overrides, callback), HOOKS):
        with faults.noted():
            _check_signature(callback, hook, _parameters(Callback, hook))
    faults.refuse()


def check_datamodule(datamodule) -> None:
    """That this is a DataModule, whose methods are called as they expect."""
    if isinstance(datamodule, type):
        raise UserError(f"{datamodule.__name__} is a class: give a datamodule, {datamodule.__name__}(...)")
    expected = {name: _parameters(DataModule, name) for name in _methods(DataModule, object)}
    if not all(hasattr(datamodule, name) for name in expected if not name.endswith("_dataloader")):
        name = type(datamodule).__name__
        raise UserError(f"{name} is no datamodule: write `class {name}(mlxmm.DataModule)`, or give loaders")
    _check_methods(datamodule, DataModule, expected, lightning_words.HOOKS)


def check_optimizer(module, compiles: bool = False) -> optim.Optimizer:
    """The optimizer that `module` configures, if it is one of MLX's that can be part of an update, compiled or not."""
    call = f"{type(module).__name__}.configure_optimizers"
    try:
        optimizer = module.configure_optimizers()
    except (TypeError, ValueError) as error:
        if "argument 'lr'" in str(error) or _got_parameters(error):  # torch's Adam(parameters, lr=1e-3)
            raise UserError(f"{call}: {lightning_words.NO_PARAMETERS}") from error
        raise
    if isinstance(optimizer, optim.MultiOptimizer):
        vars(optimizer)["_split_dictionary"] = partial(split_by_group, optimizer)
    if isinstance(optimizer, optim.Optimizer):
        _check_schedules(call, optimizer, compiles)
        return optimizer
    if isinstance(optimizer, Mapping | list | tuple):
        raise UserError(f"{call} returned a {type(optimizer).__name__}: {lightning_words.ONE_OPTIMIZER}")
    kind = "None" if optimizer is None else f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    raise UserError(f"{call} returned {kind}: {AN_OPTIMIZER}")


def _got_parameters(error: Exception) -> bool:
    """Whether an optimizer of MLX that raised `error` was given parameters in the place of its learning rate."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    own = [frame for frame in frames if frame.f_globals.get("__name__", "").startswith("mlx.optimizers")]
    return any(isinstance(frame.f_locals.get("learning_rate"), dict | list | Iterator) for frame in own)


def warn_of_zero_rate(optimizer: optim.Optimizer, num_updates: int) -> None:
    """Warn where a schedule has come to 0 half-way through the run: it may have been made for epochs."""
    for one in getattr(optimizer, "optimizers", [optimizer]):
        schedule = one._schedulers.get("learning_rate")
        if schedule is not None and num_updates > 3 and float(schedule(mx.array(num_updates // 2))) == 0:
            told = f"the learning rate is 0 from update {num_updates // 2} of {num_updates} on, or before"
            warn(f"{told}: a schedule counts updates (trainer.estimated_stepping_batches)")


def _check_schedules(call: str, optimizer: optim.Optimizer, compiles: bool) -> None:
    """That the optimizer's schedules can be part of a compiled update. One that returns Python's numbers, a constant,
    returns arrays from now on."""
    for one in getattr(optimizer, "optimizers", [optimizer]):
        for name, schedule in one._schedulers.items():
            as_array = lambda step, schedule=schedule: mx.array(schedule(step), mx.float32)
            if not isinstance(one.state[name], mx.array):
                one._schedulers[name], one.state[name] = as_array, mx.array(one.state[name], mx.float32)
            try:
                mx.compile(as_array)(one.step)
            except Exception as error:
                if not compiles:
                    continue
                told = "compute with mx (mx.where, mx.cos), take one of mlx.optimizers, or set Trainer(compile=False)"
                why = f"the schedule of {name} reads its step as Python's number (if, float, math)"
                raise UserError(f"{call}: {why}: {told}") from error


def _check_containers(module) -> None:
    """That no layer or array is in a tuple, where MLX neither trains nor saves it."""
    for prefix, part in module.named_modules():
        for key, value in part.items():
            if isinstance(value, tuple) and not key.startswith("_") and _holds_arrays(value):
                name = f"{prefix}.{key}".lstrip(".")
                told = "make it a list; constants have a name that begins with _"
                raise UserError(
                    f"{type(module).__name__}.{name} is a tuple, where MLX trains and saves nothing: {told}"
                )


def _holds_arrays(value) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(map(_holds_arrays, value.values() if isinstance(value, dict) else value))
    return isinstance(value, mx.array)


def check_trainable(module) -> None:
    """That there is something to train, and that all of it can be."""
    _check_containers(module)
    if not tree_flatten(module.trainable_parameters()):
        raise UserError(f"nothing in {type(module).__name__} is trainable: unfreeze() a part of it")


def _check_methods(part, base: type, expected: Mapping[str, list[str]], gone: Mapping[str, str]) -> None:
    """That no method of a subclass of `base` is one of Lightning's that is not here, or a misspelt one."""
    known, faults = {*expected, *_methods(base, base.__base__)}, Faults()
    for name in _methods(type(part), base):
        owner = f"{type(part).__name__}.{name}"
        if name in expected:
            with faults.noted():
                _check_signature(part, name, expected[name])
        elif hasattr(base, name):
            continue
        elif name in gone:
            faults.append(f"{owner} is not called here: {gone[name]}")
        elif near := unknown_names.closest(name, known, 0.85):
            faults.append(f"{owner} is not called here: did you mean {near}? Rename it if it is a method of your own")
    faults.refuse()


def _check_signature(part, name: str, expected: list[str]) -> None:
    """That a method can be called with the arguments that it will get."""
    own = list(inspect.signature(getattr(part, name)).parameters)
    try:
        inspect.signature(getattr(part, name)).bind(*expected)
        wrong = name == "on_before_optimizer_step" and "optimizer" in own  # as many arguments as Lightning's
    except TypeError:
        wrong = True
    if wrong:
        compiled = "; a step is compiled, and a batch_idx would compile it again each time" if name in STEPS else ""
        needs_index = "batch_idx" in {*own} - {*expected} and not compiled
        index = INDEX.get(name, "; trainer.batch_idx has the index") if needs_index else ""
        owner, call = f"{type(part).__name__}.{name}", f"{name}({', '.join(expected)})"
        raise UserError(f"{owner}({', '.join(own)}) is called as {call}: write that{compiled}{index}")


def _methods(kind: type, base: type) -> list[str]:
    """The public methods that `kind` and the classes between it and `base` define."""
    own: list[Any] = [cls for cls in kind.__mro__ if cls not in base.__mro__]
    return [n for cls in own for n, value in vars(cls).items() if n[0] != "_" and inspect.isfunction(value)]


def _parameters(kind: type, name: str) -> list[str]:
    return list(inspect.signature(getattr(kind, name)).parameters)[1:]  # without self
