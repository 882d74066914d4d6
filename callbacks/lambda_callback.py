"""LambdaCallback: a callback made from functions."""

from collections.abc import Callable

from mlxmm.errors import UserError
from mlxmm.training.callback import HOOKS, Callback


class LambdaCallback(Callback):
    """`LambdaCallback(on_train_start=lambda trainer, module: ...)`: each function is called as the hook of its name."""

    def __init__(self, **hooks: Callable):
        if unknown := sorted(set(hooks) - set(HOOKS)):
            raise UserError(f"LambdaCallback: unknown hook {', '.join(unknown)}; known are {', '.join(HOOKS)}")
        for name, function in hooks.items():
            if not callable(function):
                raise UserError(f"LambdaCallback: {name} must be a function: {function!r}")
            setattr(self, name, function)
