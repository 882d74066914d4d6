"""Who is called at which moment: callbacks in the trainer's order, then the module."""

from collections.abc import Callable, Sequence
from functools import partial

from mlxmm.callback import HOOKS, Callback
from mlxmm.config import UserError


def arrange(callbacks: Sequence[Callback], of_module: Sequence[Callback] = ()) -> list[Callback]:
    """The order of a run's callbacks: as given, those that save checkpoints last.

    What a module's `configure_callbacks` gives (`of_module`) replaces callbacks of the same class, or of one that it
    derives from. Raises `UserError` where two would save their state under one name.
    """
    kept = [callback for callback in callbacks if not any(isinstance(new, type(callback)) for new in of_module)]
    arranged = sorted([*kept, *of_module], key=lambda callback: callback.saves_checkpoints)
    keys = [callback.state_key for callback in arranged if _overrides(callback, "state_dict")]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"two callbacks save their state as {', '.join(twice)}: give one another state_key")
    return arranged


def table(callbacks: Sequence[Callback], trainer, module) -> dict[str, list[Callable]]:
    """For each moment, the methods that somebody wrote for it: an empty one costs nothing."""
    calls = {hook: [] for hook in HOOKS}
    for hook, methods in calls.items():
        methods += [partial(getattr(c, hook), trainer, module) for c in callbacks if _overrides(c, hook)]
        if own := getattr(module, hook, None):
            methods.append(own)
    return calls


def _overrides(callback: Callback, name: str) -> bool:
    return getattr(getattr(callback, name), "__func__", None) is not getattr(Callback, name)
