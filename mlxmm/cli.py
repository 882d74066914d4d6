"""The command line: flags become a config, a `UserError` becomes one line and exit code 2. tyro is used here only."""

import contextlib
import difflib
import inspect
import io
import re
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NoReturn, get_args

import attrs

from mlxmm.commands import program
from mlxmm.config import Preset, from_json
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import Ended, raised
from mlxmm.errors import UserError
from mlxmm.escaping import visible
from mlxmm.storage.disk import is_of_the_machine, reason
from mlxmm.storage.pretrained import read_json
from mlxmm.storage.runs import find_run
from mlxmm.terminal import Forgiving, discard

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
COLUMN = 42  # where the explanations of flags begin
MAX_WIDTH = 120
UNKNOWN = "Unrecognized options:"  # tyro's words
MEANT = {"data": "data.source", "model": "module"}  # other words for flags, where a recipe has these


def run_recipe(recipe: str, main: Callable, presets: Mapping[str, Preset]) -> None:
    """Run `main(config)` on the command line's flags; a `UserError` becomes one line and exit code 2.

    So does a full disk, or a folder that may not be written. A signal that ends the program becomes one line and 128 +
    its number. A closed pipe is silent. `presets` has a "default" among its names. With `--resume`, the settings that
    the run was started with take the place of the default.
    """
    with raised():
        _run(recipe, main, presets)


def _run(recipe: str, main: Callable, presets: Mapping[str, Preset]) -> None:
    try:
        with collectives.watched(waits=False):
            try:
                main(parse_config(recipe, presets, sys.argv[1:]))
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
    except UserError as error:
        _end(f"error: {error}", 2)
    except KeyboardInterrupt as error:
        _end(_interrupted(error), 128 + signal.SIGINT)
    except Ended as error:
        _end(_interrupted(error), error.code)
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        _end("", 128 + signal.SIGPIPE)
    except OSError as error:
        if not is_of_the_machine(error):
            raise
        _end(f"error: {reason(error)}", 2)


def _is_closed(stream) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _interrupted(error: BaseException) -> str:
    """What was kept, and how to go on: `open_run` has noted it."""
    return f"interrupted: {'; '.join(getattr(error, '__notes__', [])) or 'nothing was begun that could be kept'}"


def _end(line: str, code: int) -> NoReturn:
    """End the program with a line; what standard output still holds and cannot take is dropped."""
    if line:
        print(visible(line), file=Forgiving(sys.stderr), flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        discard(sys.stdout)
    raise SystemExit(code) from None


def parse_config(recipe: str, presets: Mapping[str, Preset], argv: Sequence[str]):
    """The config that `argv` asks for: a preset, or a saved config, with single settings changed by flags.

    Raises `UserError` for flags and values that do not fit. Nothing else happens: no file is touched.
    """
    name, flags = take_flag("--preset", argv)
    if name is not None and name not in presets:
        raise UserError(f"--preset {name}: choose one of {', '.join(presets)}")
    chosen = presets[name or "default"].config
    default = chosen if name else _saved_config(recipe, type(chosen), flags) or chosen
    if help_flags := {"-h", "--help", "--help-all"} & set(flags):
        print(help_text(recipe, default, presets, everything="--help-all" in help_flags))
        raise SystemExit(0)
    return _parse(default, flags)


def _parse(default, flags: Sequence[str]):
    import tyro

    explanation = io.StringIO()
    try:
        with contextlib.redirect_stderr(explanation):
            return tyro.cli(type(default), default=default, args=flags, add_help=False, registry=_registry(default))
    except SystemExit:
        told = re.split("; (?:Perhaps you meant|Arguments? (?:similar|helptext))", _unboxed(explanation.getvalue()))[0]
        told = re.sub(r"^Error parsing (?:Config: )?|\b\w*Config: ", "", told)
        raise UserError(_plainly(told, default, flags) + _suggestion(default, flags)) from None


def _plainly(told: str, default, words: Sequence[str]) -> str:
    """What tyro says of flags that it does not know, without the words beside them; and of values, without Python's."""
    told = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"a whole number is wanted, not \1", told)
    told = re.sub(r"could not convert string to float: (.*)", r"a number is wanted, not \1", told)
    if not told.startswith(UNKNOWN):
        return told
    names = [word.partition("=")[0] for word in words if word.startswith("-")]
    unknown = [name for name in dict.fromkeys(names) if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", told)]
    if unknown:
        return f"{UNKNOWN} {', '.join(unknown)}"
    has_source = any(flag.name == "data.source" for flag in flags_of(default))
    return told + ("; pictures are named by --data.source" if has_source else "")


def _suggestion(default, words: Sequence[str]) -> str:
    """The flags that someone may have meant who wrote some that are not there."""
    known = list(flags_of(default))
    names = {f"--{name}" for flag in known for name in flag.names}
    unknown = [word.partition("=")[0] for word in words if word.startswith("--")]
    unknown = [word for word in unknown if word not in names and word.replace("no-", "", 1) not in names]
    meant = dict.fromkeys(name for word in unknown for name in _nearest(word, known))
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _nearest(word: str, known: "Sequence[Flag]") -> list[str]:
    """At most two flags whose names, or their last parts, are like `word`: of equals those used most, or short."""
    word = MEANT.get(word.removeprefix("--"), word.removeprefix("--"))
    words = lambda name: {part.rstrip("s") for part in name.split("-")}
    likeness = lambda name: 0.9 if words(word) <= words(name) else difflib.SequenceMatcher(None, word, name).ratio()
    used = lambda flag: (flag.is_first, not flag.rare, -flag.name.count("-"))
    like = lambda flag: max(map(likeness, (*flag.names, flag.path[-1].replace("_", "-"))))
    rated = sorted(((like(flag), *used(flag), flag) for flag in known), key=lambda one: one[:-1], reverse=True)
    return [f"--{flag.names[-1]}" for *rank, flag in rated[:2] if rank[0] > 0.7 and rank == list(rated[0][:-1])]


def take_flag(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `flag`, written `--flag value` or `--flag=value`, and the other arguments."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None:
                raise UserError(f"{flag} needs a value")
        elif word.startswith(flag + "="):
            value = word.removeprefix(flag + "=")
        else:
            rest.append(word)
    return value, rest


def _saved_config(recipe: str, cls: type, flags: Sequence[str]):
    """The config that the run to be resumed was started with; None where none is to be resumed."""
    if "resume" not in attrs.fields_dict(cls):
        return None
    resume, rest = take_flag("--resume", flags)
    run_dir, _ = take_flag("--run-dir", rest)
    if resume is None or {"-h", "--help", "--help-all"} & set(flags):
        return None
    path = find_run(recipe, resume, run_dir and Path(run_dir)) / "config.json"
    try:
        return from_json(cls, read_json(path))
    except UserError as error:
        told = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise UserError(f"{told}; to resume the run without that file, give --preset and its flags") from None


# ---- the flags of a config


@attrs.frozen
class Flag:
    """A setting as a flag: its dotted path in the config, its field and its default."""

    path: tuple[str, ...]
    field: attrs.Attribute
    default: Any
    rare: bool

    @property
    def name(self) -> str:
        return ".".join(self.path).replace("_", "-")

    @property
    def names(self) -> list[str]:
        """Its name, and its short one if it has one, without the hyphens in front."""
        return [self.name, *filter(None, [(self.field.metadata.get("flag") or "").removeprefix("--")])]

    @property
    def is_first(self) -> bool:
        """Whether it is among those used most."""
        return bool(self.field.metadata.get("first"))


def flags_of(config, path: tuple[str, ...] = (), rare: bool = False) -> Iterator[Flag]:
    """The flags of a config, section by section."""
    sections = []
    for field in attrs.fields(type(config)):
        value, here = getattr(config, field.name), rare or field.metadata.get("rare", False)
        if field.metadata.get("internal"):
            continue
        if attrs.has(type(value)):
            sections.append((field, value, here))
        else:
            yield Flag((*path, field.name), field, value, here)
    for field, value, here in sections:
        without, shown = (
            {(*path, field.name, *name.split(".")) for name in field.metadata.get(kind, ())}
            for kind in ("without", "shown")
        )
        for flag in flags_of(value, (*path, field.name), here):
            if flag.path not in without:
                yield attrs.evolve(flag, rare=False) if flag.path in shown else flag


def _registry(default):
    """Tells tyro which fields are flags, and their second names."""
    import tyro

    flags, registry = {flag.path for flag in flags_of(default)}, tyro.constructors.ConstructorRegistry()
    names_of = _names_by_class(default, flags)

    @registry.struct_rule
    def describe(info: tyro.constructors.StructTypeInfo):
        if info.type not in names_of:
            return None
        fields = [field for field in attrs.fields(info.type) if field.name in names_of[info.type]]
        fixed = {
            field.name: getattr(info.default, field.name)
            for field in attrs.fields(info.type)
            if field not in fields and field.init
        }
        specs = tuple(
            tyro.constructors.StructFieldSpec(
                name=field.name, type=_type_of_flag(field), default=getattr(info.default, field.name)
            )
            for field in fields
        )
        return tyro.constructors.StructConstructorSpec(lambda **values: info.type(**fixed | values), specs)

    return registry


def _names_by_class(config, flags: set[tuple[str, ...]], path: tuple[str, ...] = ()) -> dict[type, set[str]]:
    """For each class of settings in `config`, the fields that are flags or hold some."""
    used = {flag[len(path)] for flag in flags if flag[: len(path)] == path}
    names = {type(config): used}
    for name in used:
        if attrs.has(type(getattr(config, name))):
            names |= _names_by_class(getattr(config, name), flags, (*path, name))
    return names


def _type_of_flag(field: attrs.Attribute):
    import tyro

    positional: Any = tyro.conf.Positional
    if field.metadata.get("positional"):
        return positional[field.type]
    if second := field.metadata.get("flag"):
        return Annotated[field.type, tyro.conf.arg(aliases=[second])]
    return field.type


def _unboxed(box: str) -> str:
    """tyro's boxed explanation as one line, without its frame and its pointer to `--help`."""
    lines = [line.strip("│╭╮╰╯─ \n") for line in box.splitlines()[1:]]
    parts = " ".join(line.strip("-") and line or "|" for line in lines).split("|")  # a rule is of - without Unicode
    parts = [" ".join(part.split()) for part in parts]
    return "; ".join(part for part in parts if part and "full helptext" not in part)


# ---- help


def help_text(recipe: str, default, presets: Mapping[str, Preset], *, everything: bool) -> str:
    """What a recipe is for, its presets, and its flags: those that matter first, then section by section."""
    module = sys.modules[type(default).__module__]
    flags = [flag for flag in flags_of(default) if everything or not flag.rare]
    first = [flag for flag in flags if flag.is_first]
    about = inspect.cleandoc(module.__doc__ or "").replace(f"python -m recipes.{recipe}", program(recipe))
    parts = [f"usage: {program(recipe)} [FLAGS]", about]
    if len(presets) > 1:
        parts.append(_block("presets", ((f"--preset {name}", preset.about) for name, preset in presets.items())))
    parts.append(_block("most used", map(_described, first)))
    rest = [flag for flag in flags if flag not in first]
    for title in dict.fromkeys(flag.path[0] if len(flag.path) > 1 else "" for flag in rest):
        own = [flag for flag in rest if (flag.path[0] if len(flag.path) > 1 else "") == title]
        parts.append(_block(title or "run", map(_described, own)))
    if not everything:
        parts.append("--help-all shows every flag.")
    return "\n\n".join(part for part in parts if part)


def _block(title: str, rows) -> str:
    lines = [line for left, right in rows for line in _row(left, right)]
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _row(left: str, right: str) -> list[str]:
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 40)).columns) - COLUMN
    lines = textwrap.wrap(right, max(30, width)) or [""]
    head = f"  {left}".ljust(COLUMN - 1)
    first = [f"{head} {lines[0]}"] if len(head) < COLUMN else [head, " " * COLUMN + lines[0]]
    return first + [" " * COLUMN + line for line in lines[1:]]


def _described(flag: Flag) -> tuple[str, str]:
    metadata = flag.field.metadata
    if metadata.get("positional"):
        return flag.name.upper(), metadata["help"]
    names = f"--{flag.name}" + (f", {metadata['flag']}" if metadata.get("flag") else "")
    default = "none" if flag.default is None else flag.default
    shown = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{names} {_metavar(flag.field.type)}".rstrip(), f"{metadata.get('help', '')} [{shown or 'none'}]"


def _metavar(kind) -> str:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return "|".join(dict.fromkeys(METAVARS[one] for one in kinds if one in METAVARS))
