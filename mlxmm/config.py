"""Settings: attrs classes whose fields carry their help text and their checks, and the flags made from them."""

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import attrs

from mlxmm.errors import UserError


def option(default, help: str, *checks):
    """An attrs field that knows its `--help` text and checks its own value."""
    return attrs.field(default=default, validator=list(checks), metadata={"help": help})


def positional(default, help, *checks):
    """An `option` that is given on the command line without its name."""
    return attrs.field(default=default, validator=list(checks), metadata={"help": help, "positional": True})


def to_json(config) -> dict:
    """`config` as plain JSON values; paths become strings, tuples lists."""
    return attrs.asdict(config, value_serializer=lambda _, __, v: str(v) if isinstance(v, Path) else v)


def from_json(cls: type, values: Mapping[str, Any]):
    """Build `cls` from what `to_json` gave. Unknown names raise `UserError`; missing ones keep their default."""
    types = {field.name: field.type for field in attrs.fields(cls)}
    if unknown := sorted(set(values) - set(types)):
        raise UserError(f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(types)}")
    return cls(**{name: _typed(types[name], value) for name, value in values.items()})


def _typed(kind, value):
    """`value` as JSON has it, as `kind` wants it."""
    if attrs.has(kind):
        return from_json(kind, value)
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return value
