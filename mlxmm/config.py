"""Settings: attrs classes whose fields carry their help text and their checks, and the flags made from them."""

import contextlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import attrs


class UserError(ValueError):
    """What the person at the keyboard can put right. Recipes print it on one line and exit with 2."""


def option(default, help: str, *checks):
    """An attrs field that knows its `--help` text and checks its own value."""
    return attrs.field(default=default, validator=list(checks), metadata={"help": help})


def positional(default, help, *checks):
    """An `option` that is given on the command line without its name."""
    return attrs.field(default=default, validator=list(checks), metadata={"help": help, "positional": True})


def run_recipe(main: Callable, presets: Mapping[str, Any], read_saved: Callable = lambda argv: None) -> None:
    """Run `main(config)` on the command line's flags; a `UserError` becomes one line and exit code 2.

    `presets` maps names to configs, "default" among them. `read_saved(argv)` may return a config to
    start from instead: the one that a run to be resumed was started with.
    """
    from mlxmm import distributed

    try:
        with distributed.watched(waits=False):
            main(parse_config(presets, sys.argv[1:], read_saved))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_config(presets: Mapping[str, Any], argv: Sequence[str], read_saved: Callable = lambda argv: None):
    """The config that `argv` asks for: a preset, or a saved config, with single settings changed by flags.

    Raises `UserError` for flags and values that do not fit, before anything else happens.
    """
    import tyro

    name, flags = take_flag("--preset", argv)
    if name is not None and name not in presets:
        raise UserError(f"--preset {name}: choose one of {', '.join(presets)}")
    default = presets[name or "default"] if name else read_saved(flags) or presets["default"]
    described = f"{sys.modules[type(default).__module__].__doc__}\n\n--preset: {', '.join(presets)}"
    explanation = io.StringIO()
    try:
        with contextlib.redirect_stderr(explanation):
            return tyro.cli(type(default), default=default, args=flags, description=described, registry=_with_help())
    except SystemExit as exit:
        if exit.code in (0, None):  # --help
            raise
        raise UserError(_unboxed(explanation.getvalue())) from None


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


def take_flag(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `flag`, written `--flag value` or `--flag=value`, and the other arguments."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None:
                raise UserError(f"{flag} wants a value")
        elif word.startswith(flag + "="):
            value = word.removeprefix(flag + "=")
        else:
            rest.append(word)
    return value, rest


def _with_help():
    """What tells tyro to take a flag's help from its `option`."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.struct_rule
    def describe(info: tyro.constructors.StructTypeInfo):
        if not attrs.has(info.type):
            return None
        fields = tuple(
            tyro.constructors.StructFieldSpec(
                name=field.name,
                type=tyro.conf.Positional[field.type] if field.metadata.get("positional") else field.type,
                default=getattr(info.default, field.name, field.default),
                helptext=field.metadata.get("help"),
            )
            for field in attrs.fields(info.type)
        )
        return tyro.constructors.StructConstructorSpec(instantiate=info.type, fields=fields)

    return registry


def _unboxed(box: str) -> str:
    """tyro's boxed explanation as one line, without its frame and its pointer to `--help`."""
    lines = [line.strip("│╭╮╰╯─ \n") for line in box.splitlines()[1:]]
    parts = " ".join(line.strip("-") and line or "|" for line in lines).split("|")  # a rule is of - without Unicode
    parts = [" ".join(part.split()) for part in parts]
    return "; ".join(part for part in parts if part and "full helptext" not in part)
