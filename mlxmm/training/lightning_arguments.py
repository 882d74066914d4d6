"""Arguments of Lightning's classes and methods: those that change nothing are dropped, others are answered."""

import abc
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from mlxmm.config import to_json
from mlxmm.errors import Faults, UserError
from mlxmm.terminal import counted
from mlxmm.training.lightning_words import (
    CALLS,
    CONSTRUCTORS,
    LOADING,
    NO_OP_LOADING,
    NO_OP_VALUES,
    POSITIONS,
    SETTINGS,
)
from mlxmm.training.unknown_names import UnknownName, missing, refuse_arguments


class AnswersArguments(abc.ABCMeta):
    """The class of classes that are made with arguments of Lightning's: those that change nothing here are dropped,
    others that are not there are answered with a `UserError`."""

    def __call__(cls, *args, **settings):
        if any(map(_is_ours, cls.__mro__)):
            own = inspect.signature(cls.__init__).parameters
            args, settings = _by_name(cls, args, settings)
            dropped = [name for name, value in settings.items() if name not in own and _changes_nothing(name, value)]
            settings = {name: value for name, value in settings.items() if name not in dropped}
        refuse_arguments(cls.__name__, cls.__init__, settings, CONSTRUCTORS)
        return super().__call__(*args, **settings)


def _by_name(kind: type, args: tuple, settings: dict) -> tuple[tuple, dict]:
    """Arguments by position as `kind` takes them; further ones have the names of Lightning's. Raises `UserError`."""
    parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]  # type: ignore[misc]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return args, settings
    count = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    names = POSITIONS.get(kind.__name__, ())[count : len(args)]
    if len(names) < len(args) - count:
        others = ", ".join(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
        told = f"{kind.__name__} takes {counted(count, 'argument')} by position, not {len(args)}"
        raise UserError(told + (f": write the others by name, {others}" if others else ""))
    if settings.keys() & names:
        return args, settings  # Python says which is given twice
    return args[:count], settings | dict(zip(names, args[count:]))


def _changes_nothing(name: str, value) -> bool:
    return name in CONSTRUCTORS and (value is None or value in NO_OP_VALUES.get(name, ()))


def _is_ours(kind: type) -> bool:
    """Whether a class is a callback or logger of mlxmm's own: another package may be called `callbacks`, too."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    callbacks = (Path(__file__).parents[1] / "callbacks").resolve()
    is_inside = kind.__module__.startswith("mlxmm.") or file is not None and Path(file).resolve().parent == callbacks
    return is_inside and kind.__name__ not in ("Callback", "Logger")


def loading_arguments(call: str, kind: type, arguments: Mapping) -> dict:
    """The arguments of `load_from_checkpoint` that are of `kind`: those of Lightning's that change nothing here are
    dropped, others of Lightning's are answered with a `UserError`."""
    own = {name: value for name, value in arguments.items() if name in inspect.signature(kind).parameters}
    rest = {name: value for name, value in arguments.items() if name not in {*own, "map_location", "weights_only"}}
    changing = [name for name in LOADING if rest.get(name, NO_OP_LOADING[name]) not in (None, NO_OP_LOADING[name])]
    Faults(str(missing(call, f"argument {name}", {f"argument {name}": LOADING[name]})) for name in changing).refuse()
    return own | {name: value for name, value in rest.items() if name not in LOADING}


class Settings(dict):
    """Settings by name, or as attributes."""

    def __getattr__(self, name: str):
        if name in self:
            return self[name]
        raise UnknownName(f"hparams has no {name}: {SETTINGS}")


def settings_of(part) -> Settings:
    """The settings of a module or of data that loggers write: those of its `config`, if it has one."""
    config = vars(part).get("config")
    return Settings(to_json(config) if attrs.has(type(config)) else {})


def answers_calls(method: Callable) -> Callable:
    """Make `method` of a Trainer answer arguments of Lightning's that it does not have."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        if not hasattr(self, "callback_metrics"):
            raise UserError(f"Trainer is a class: make one first, Trainer(...).{method.__name__}(...)")
        refuse_arguments(method.__name__, method, kwargs, CALLS)
        return method(self, *args, **kwargs)

    return call
