"""What the source of a Module says in Lightning's words: told beside an error, so that one does not follow another.

The source alone proves nothing, as a line may never run: nothing is refused for it.
"""

import ast
import inspect
from collections.abc import Iterator

from mlxmm.training import lightning_words, unknown_names
from mlxmm.training.module import Module

STEPS = ("training_step", "validation_step", "test_step")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
NOT_THERE = object()


def words_of_lightning(module) -> list[str]:
    """A line for each word of Lightning's in the methods of `module`, with what to write instead."""
    kinds = type(module).__mro__[: type(module).__mro__.index(Module)]
    own = {name: value for kind in reversed(kinds) for name, value in vars(kind).items()}
    methods = filter(inspect.isfunction, own.values())
    return list(dict.fromkeys(line for method in methods for line in _lines(module, method)))


def _lines(module, method) -> Iterator[str]:
    name, owner = method.__name__, type(module).__name__
    for node in _nodes(method):
        match node:
            case ast.Attribute(ast.Name("self"), word) if word in lightning_words.MODULE and not _has(module, word):
                yield str(unknown_names.missing(owner, word, lightning_words.MODULE))
            case ast.Return(ast.Name("loss")) if name in STEPS:
                yield f'{name} returned a bare array: return {{"loss": loss}}'
            case ast.Call(ast.Attribute(_, "item"), []) if name in STEPS:
                yield f"{name} reads a number out of an array (.item(), float, if): {lightning_words.READS_A_NUMBER}"
            case ast.Call(ast.Attribute(_, word)) if name in STEPS and word in lightning_words.TENSORS:
                yield str(unknown_names.missing("an array of MLX", word, lightning_words.TENSORS))
            case ast.Return(ast.Dict() | ast.List() | ast.Tuple() as value) if name == "configure_optimizers":
                kind = type(value).__name__.lower()
                yield f"{owner}.{name} returned a {kind}: {lightning_words.ONE_OPTIMIZER}"
            case ast.Call(_, _, keywords) if name == "configure_optimizers" and "lr" in {one.arg for one in keywords}:
                yield f"{owner}.{name}: {lightning_words.NO_PARAMETERS}"


def _has(module, name: str) -> bool:
    """Whether a module has an attribute: properties are not run, and arrays and layers are items."""
    return name in module or inspect.getattr_static(module, name, NOT_THERE) is not NOT_THERE


def _nodes(method) -> list[ast.AST]:
    """The nodes of its source, line by line, but for what functions within it return."""
    try:
        source = inspect.getsource(method)
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)  # texts in it may not be indented
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or made by a program
        return []
    _, *inner = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)] or [tree]
    others = {node for function in inner for node in ast.walk(function) if isinstance(node, ast.Return)}
    return sorted((n for n in ast.walk(tree) if n not in others), key=lambda node: getattr(node, "lineno", 0))
