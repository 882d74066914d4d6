"""MLX's MultiOptimizer where a schedule closes layers again."""

import mlx.optimizers as optim
from mlx.utils import tree_map, tree_map_with_path


def split_by_group(optimizer: optim.MultiOptimizer, gradients: dict) -> list[dict]:
    """For each optimizer of `optimizer`, `gradients` with empty dicts in the places of the others.

    MLX's own splitting builds lists anew: it loses the layers without gradients at their ends, which have moments.
    """
    first = lambda name, array: next(i for i, holds in enumerate(optimizer.filters) if holds(name, array))
    groups = tree_map_with_path(first, gradients)
    within = lambda i: tree_map(lambda array, group: array if group == i else {}, gradients, groups)
    return [within(i) for i in range(len(optimizer.optimizers))]
