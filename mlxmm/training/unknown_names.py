"""Names that are not here: the exception tells what to write instead, or which known name is like it."""

import difflib
import dis
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping

from mlxmm.errors import Faults, UserError


class UnknownName(UserError, AttributeError):
    """A name that is not here. An AttributeError too, so that `hasattr` and `getattr` work as everywhere."""


def missing(owner: str, name: str, answers: Mapping[str, str], known: Iterable[str] = ()) -> UnknownName:
    """The exception for a `name` that `owner` does not have: what to write instead, or what is like it."""
    return UnknownName(f"{owner} has no {name}{answer(name, answers, known)}")


class UnknownImport(UserError, ImportError):
    """A name that `from … import` does not find: an ImportError too, as everywhere."""


def missing_in(package: str, name: str, answers: Mapping[str, str], known: Iterable[str]) -> UserError:
    """The exception for the `__getattr__` of a package. `from package import name` would hide an AttributeError."""
    frame = sys._getframe(2)
    is_import = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "IMPORT_FROM"
    error = missing(package, name, answers, known)
    return UnknownImport(str(error)) if is_import else error


def refuse_arguments(call: str, function: Callable, arguments: Iterable[str], answers: Mapping[str, str]) -> None:
    """Raise `UserError` for all of the named `arguments` that `function` does not take."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [name for name in arguments if name not in parameters]
    Faults(f"{call} has no argument {name}{answer(name, answers, parameters)}" for name in unknown).refuse()


def closest(name: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """The known name that `name` is most likely a misspelling of."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def answer(name: str, answers: Mapping[str, str], known: Iterable[str]) -> str:
    """What to add to "there is no `name`": the answer to it, or the known name that is like it."""
    if name in answers:
        return f": {answers[name]}"
    near = closest(name, known, 0.7)
    return f": did you mean {near}?" if near else ""
