"""ModelSummary: the number of parameters of each part, and how many of them are trainable."""

from mlx.utils import tree_flatten

from mlxmm.training.callback import Callback


class ModelSummary(Callback):
    """Prints a table when training starts; with strategy fsdp, of the parameters that this process holds."""

    def on_train_start(self, trainer, module):
        if trainer.config.enable_model_summary and trainer.is_global_zero:
            print(summary(module))


def summary(module) -> str:
    """One line per part of `module`: parameters and trainable parameters."""
    counts: dict[str, list[int]] = {}
    for column, tree in enumerate((module.parameters(), module.trainable_parameters())):
        for name, array in tree_flatten(tree):
            for part in (name.split(".")[0], "total"):
                counts.setdefault(part, [0, 0])[column] += array.size
    counts["total"] = counts.pop("total")
    lines = [f"{'part':<20}{'parameters':>14}{'trainable':>14}"]
    return "\n".join(lines + [f"{part:<20}{n:>14,}{trained:>14,}" for part, (n, trained) in counts.items()])
