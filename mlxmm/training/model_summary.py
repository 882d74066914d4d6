"""ModelSummary: the parameters of each part, how many of them are trainable, and their dtypes."""

from collections.abc import Iterable

from mlx.utils import tree_flatten

from mlxmm.compute.precision import dtype_name
from mlxmm.terminal import say
from mlxmm.training.callback import Callback


class ModelSummary(Callback):
    """Prints a table when training starts; with strategy fsdp, of the parameters that this process holds."""

    logs = ()

    def on_train_start(self, trainer, module):
        if trainer.config.enable_model_summary and trainer.is_global_zero:
            say(*summary(module).split("\n"))


def summary(module) -> str:
    """One line per part of `module`: parameters, trainable parameters, and the dtypes of both."""
    arrays, trained = (dict(tree_flatten(tree)) for tree in (module.parameters(), module.trainable_parameters()))
    parts: dict[str, list[str]] = {}
    for name in arrays:
        parts.setdefault(name.split(".")[0], []).append(name)
    lines = [f"{type(module).__name__}:", f"{'part':<20}{'parameters':>14}{'trainable':>14}  dtypes"]
    return "\n".join(
        lines + [_line(part, names, arrays, trained) for part, names in (*parts.items(), ("total", arrays))]
    )


def _line(part: str, names: Iterable[str], arrays: dict, trained: dict) -> str:
    num_trained = sum(trained[name].size for name in names if name in trained)
    dtypes = dict.fromkeys(dtype_name(arrays[name].dtype) for name in names)
    return f"{part:<20}{sum(arrays[name].size for name in names):>14,}{num_trained:>14,}  {', '.join(dtypes)}"
