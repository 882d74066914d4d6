"""What of a module is trainable: read, set, and matched by dotted names."""

import contextlib
import re
from collections.abc import Iterable, Iterator

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm.compute.named_arrays import is_differentiable, own_arrays, put_arrays
from mlxmm.compute.quantized import is_quantized
from mlxmm.errors import UserError
from mlxmm.training.module import Module
from mlxmm.training.unknown_names import closest


def trainable_names(module: nn.Module) -> list[str]:
    """The dotted names of the parameters that receive gradients."""
    return [name for name, _ in tree_flatten(module.trainable_parameters())]


def set_trainable(module: nn.Module, names: Iterable[str]) -> None:
    """Make the named parameters trainable and freeze all others. Of a part with several names, any will do."""
    wanted, parts = set(names), {}
    for prefix, part in module.named_modules():
        parts.setdefault(id(part), (part, []))[1].append(prefix)
    for part, prefixes in parts.values():
        chosen = [key for key in own_arrays(part) if any(f"{p}.{key}".lstrip(".") in wanted for p in prefixes)]
        part.unfreeze(recurse=False)  # lists and dicts that were frozen as a whole
        part.freeze(recurse=False)
        part.unfreeze(recurse=False, keys=chosen)


@contextlib.contextmanager
def frozen_parts_unchanged(module: nn.Module) -> Iterator[None]:
    """At the end of the block, undo what frozen parts wrote into themselves: the running statistics of a BatchNorm.

    An array that was written belongs to the smallest part around it that has other parameters. That part is frozen if
    none of these is trainable.
    """
    before = dict(tree_flatten(module.parameters()))
    yield
    now, trained = dict(tree_flatten(module.parameters())), set(trainable_names(module))
    written = [name for name, array in now.items() if name in before and array is not before[name]]
    others = now.keys() - written
    put_arrays(module, {name: before[name] for name in written if _in_frozen_part(name, others, trained)})


def _in_frozen_part(name: str, others: Iterable[str], trained: set[str]) -> bool:
    while name:
        name = name.rpartition(".")[0]
        if around := [other for other in others if not name or other.startswith(f"{name}.")]:
            return trained.isdisjoint(around)
    return False


def match_parameters(module: nn.Module, pattern: str) -> list[str]:
    """The names of the trainable parameters under `pattern`, a dotted name with Python slices for layers.

    Examples: "projector", "language_model.model.layers[-2:]", "vision.layers[0].mlp"; or one of the module's
    `parameter_groups`: "lora". Quantized weights, and arrays of integers and booleans, cannot be trained. Raises
    `UserError` if nothing matches.
    """
    groups = module.parameter_groups() if isinstance(module, Module) else {}
    expression = re.compile(_expand(module, pattern) + r"(\.|$)")
    packed = tuple(f"{prefix}." for prefix, part in module.named_modules() if is_quantized(part))
    found = groups.get(pattern) or filter(expression.match, (name for name, _ in tree_flatten(module.parameters())))
    integers = {name for name, array in tree_flatten(module.parameters()) if not is_differentiable(array)}
    names = [name for name in found if not name.startswith(packed) and name not in integers]
    if not names:
        told = f"{pattern!r} matches no parameter to train in {type(module).__name__}"
        raise UserError(f"{told}{_meant(module, pattern) or _parts(module, groups)}")
    return names


def _meant(module: nn.Module, pattern: str) -> str | None:
    """The part that `pattern` most likely means: the layers of a Sequential are in its list `layers`."""
    names = [prefix for prefix, part in module.named_modules() if prefix and part.parameters()]
    names += [name for name, _ in tree_flatten(module.parameters())]
    without_layers = {re.sub(r"\.layers\b", "", name): name for name in names}
    near = without_layers.get(pattern) or closest(pattern, names)
    return f": did you mean {near}?" if near and near != pattern else None


def _parts(module: nn.Module, groups: Iterable[str]) -> str:
    return f", whose parts are {', '.join(sorted({*module.children(), *groups}))}"


def _expand(module: nn.Module, pattern: str) -> str:
    """`pattern` as a regular expression, with slices replaced by the layers they select."""
    expression, part = "", module
    for found in re.finditer(r"[^.\[\]]+|\[[^\]]*\]", pattern):
        word, before = found[0], pattern[: found.start()]
        if not word.startswith("["):
            expression += ("\\." if expression else "") + re.escape(word)
            part = part.get(word, {}) if isinstance(part, dict) else {}
            continue
        if isinstance(part, nn.Module):
            told = f"write {before}.layers{word}" if "layers" in part else f"its parts are {', '.join(part.children())}"
            raise UserError(f"{pattern!r}: {before} is no list of layers: {told}")
        chosen = _choose(word[1:-1], len(part))
        expression += rf"\.({'|'.join(map(str, chosen)) or 'none'})"
        part = part[chosen[0]] if chosen else {}
    return expression


def _choose(index: str, length: int) -> list[int]:
    """The indices that "-2:", "3" or "::2" select out of `length`."""
    try:
        numbers = [int(number) if number else None for number in index.split(":")]
        chosen = range(length)[slice(*numbers) if len(numbers) > 1 else numbers[0]]
    except (ValueError, TypeError, IndexError):
        raise UserError(f"[{index}] is not an index or slice of {length} layers") from None
    return [chosen] if isinstance(chosen, int) else list(chosen)
