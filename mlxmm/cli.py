"""The command line: flags become a config, a `UserError` one line and exit code 2."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from mlxmm.config import from_json
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.storage.runs import RunConfig, find_run


def run_recipe(main: Callable, presets: Mapping[str, Any], read_saved: Callable = lambda argv: None) -> None:
    """Run `main(config)` on the command line's flags; a `UserError` becomes one line and exit code 2.

    `presets` maps names to configs, "default" among them. `read_saved(argv)` may return a config to
    start from instead: the one that a run to be resumed was started with.
    """

    try:
        with collectives.watched(waits=False):
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


def read_saved_config(cls: type, recipe: str) -> Callable[[Sequence[str]], RunConfig | None]:
    """What reads, for the flags of a run to be resumed, the config that it was started with."""

    def read(argv):
        resume, rest = take_flag("--resume", argv)
        run_dir, _ = take_flag("--run-dir", rest)
        if resume is None:
            return None
        folder, ckpt_path = find_run(resume, run_dir and Path(run_dir), recipe)
        path = (ckpt_path.resolve().parent.parent if ckpt_path else folder) / "config.json"
        return from_json(cls, json.loads(path.read_text())) if path.exists() else None

    return read
