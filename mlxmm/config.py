"""Settings: attrs classes whose fields carry their help text and their checks, to and from JSON."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import attrs

from mlxmm.errors import UserError


def option(
    default, help: str, *checks, flag: str | None = None, first: bool = False, rare: bool = False, converter=None
):
    """An attrs field that knows its `--help` text and checks its own value.

    `flag` is a second, shorter name on the command line. `first` shows it at the top of a recipe's `--help`, `rare`
    in `--help-all` only. `converter` makes the value of what is given in Python.
    """
    metadata = {"help": help, "flag": flag, "first": first, "rare": rare}
    return attrs.field(default=default, validator=list(checks), metadata=metadata, converter=converter)


def plain(value):
    """A number of NumPy, MLX or torch as Python's, which JSON and comparisons with `int` know; all else as it is.
    Of a mapping, its keys and values."""
    if isinstance(value, Mapping):
        return {plain(key): plain(part) for key, part in value.items()}
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def texts(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Texts as a tuple: a lone one is the only one, None is none. A converter of fields."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def positional(default, help: str, *checks):
    """An `option` that is given on the command line without its name."""
    metadata = {"help": help, "positional": True, "first": True}
    return attrs.field(default=default, validator=list(checks), metadata=metadata)


def section(default, *, without: tuple[str, ...] = (), rare: bool = False, shown: tuple[str, ...] = ()):
    """A field that holds settings of its own. Those named in `without` are set by the program: they are no flags.

    `--help` shows of a `rare` section only those named in `shown`; "a.b" is the setting b of its section a.
    """
    return attrs.field(default=default, metadata={"without": without, "rare": rare, "shown": shown})


def internal(default):
    """A field that presets set: it is part of a run's settings, but no flag."""
    return attrs.field(default=default, metadata={"internal": True})


def checked(cls: type, fields: list) -> list:
    """`@attrs.define(field_transformer=checked)`: arguments of another type or out of bounds raise `UserError`."""
    return [_checked(field) if field.init else field for field in fields]


def _checked(field: attrs.Attribute) -> attrs.Attribute:
    converter = plain if field.converter is None and _is_checked(field.type) else field.converter
    return field.evolve(validator=_checks(field.validator), converter=converter)


def _is_checked(kind) -> bool:
    return _kinds(kind).keys() <= {int, float, bool, str, NoneType, Callable, Mapping}


def _checks(validator: Callable | None) -> Callable:
    def check(instance, attribute, value) -> None:
        owner = type(instance).__name__
        try:
            if _is_checked(attribute.type):
                exactly(value, attribute.type)
        except TypeError as error:
            raise UserError(f"{owner}({attribute.name}=...): {error}") from None
        try:
            if validator:  # a list of none at all, of some fields
                validator(instance, attribute, value)
        except (TypeError, ValueError) as error:  # some checks of attrs give more arguments than their text
            raise error if isinstance(error, UserError) else UserError(f"{owner}: {error.args[0]}") from None

    return check


@attrs.frozen
class Preset:
    """A config with a name of its own on the command line, and a line that says what it is for."""

    about: str
    config: Any


def to_json(config) -> dict:
    """`config` as plain JSON values; paths become strings, tuples lists."""
    return _converter().unstructure(config)


def from_json(cls: type, values: Mapping[str, Any]):
    """Build `cls` from what `to_json` gave; settings that are missing keep their default.

    Raises `UserError` for names that `cls` does not have, and for values of another type or out of bounds.
    """
    try:
        return _converter().structure(values, cls)
    except Exception as error:  # cattrs and the checks of the fields raise several kinds
        raise UserError(f"{cls.__name__} cannot be read: {_first_line(error)}") from None


@functools.cache
def _converter():
    import cattrs
    from cattrs.strategies import configure_union_passthrough

    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, exactly)
    converter.register_structure_hook(float, lambda value, _: float(exactly(value, float)))
    is_texts = lambda kind: kind == tuple[str, ...]
    converter.register_structure_hook_func(is_texts, lambda value, _: tuple(exactly(v, str) for v in texts(value)))
    converter.register_structure_hook(Path, lambda value, _: Path(exactly(value, str)))
    converter.register_unstructure_hook(Path, str)
    converter.register_unstructure_hook(tuple, list)
    configure_union_passthrough(int | float | str | bool | None, converter)
    return converter


def exactly(value, kind):
    """`value` if it is of this type: a string is no number, a truth value no integer, but an integer is a float, and no
    number is endless or has more than 64 bits. Raises `TypeError`."""
    kinds = _kinds(kind)
    taken = (*kinds, int) if float in kinds else tuple(kinds)
    if not isinstance(value, taken) or (isinstance(value, bool) and bool not in kinds):
        names = ["None" if k is NoneType else k.__name__ for k in kinds]
        raise TypeError(f"{value!r} is not of type {' or '.join(names)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{value!r} is not a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TypeError("a number of more than 64 bits is too large")
    return value


def _kinds(kind) -> dict:
    """The types of a union, or the one that `kind` is, in order, without those of their parts."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return dict.fromkeys(get_origin(kind) or kind for kind in kinds)


def _first_line(error: Exception) -> str:
    """What went wrong, and in which setting, on one line."""
    from cattrs import transform_error

    if not hasattr(error, "exceptions"):
        return " ".join(str(error).split())
    [line, *_] = transform_error(error, path="settings")
    while hasattr(error, "exceptions"):
        error = error.exceptions[0]
    reason = f": {error.args[0]}" if isinstance(error, ValueError) and error.args else ""
    return " ".join((line + reason).split())  # a name may hold anything
