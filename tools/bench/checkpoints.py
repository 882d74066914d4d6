"""Saving float32 parameters to files that are whole or absent: all trained, or one of 60 beside frozen ones.

Ours are hashed and flushed to the disk before they count; torch.save does neither.
"""

import shutil
from itertools import count

from tools.bench.child import Case, clocked

ARRAY = 10_000_000
SHAPE = (1_000, ARRAY // 1_000)


def ours(case: Case):
    """100 million parameters that are all trained: weights alone."""
    import mlx.core as mx

    from mlxmm.storage import checkpoint

    weights = {f"layers.{i}.weight": mx.random.normal(SHAPE) for i in range(10)}
    mx.eval(weights)
    contents = {"weights": weights, "state": {}}
    return lambda: clocked(checkpoint.save, case.folder / "checkpoint", contents, lambda folder: None)[1]


def theirs(case: Case):
    import torch

    weights = {f"layers.{i}.weight": torch.randn(SHAPE) for i in range(10)}
    return lambda: clocked(torch.save, weights, case.folder / "checkpoint.pt")[1]


def partly_trained(case: Case) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """The shapes of 600 million parameters (quick: 100), and of Adam's moments of the sixtieth that is trained."""
    frozen = {f"layers.{i}.weight": SHAPE for i in range(9 if case.quick else 59)}
    rows = (ARRAY if case.quick else 6 * ARRAY) * 10 // 60 // SHAPE[1]
    return frozen | {"projector.weight": (rows, SHAPE[1])}, {f"projector.weight.{m}": (rows, SHAPE[1]) for m in "mv"}


def ours_partly_trained(case: Case):
    """The first save, which is not measured, writes what is frozen. Each one deletes the one before, as a run does."""
    import mlx.core as mx

    from mlxmm.storage import checkpoint

    weights, moments = (
        {name: mx.random.normal(shape) for name, shape in part.items()} for part in partly_trained(case)
    )
    mx.eval(weights, moments)
    contents = {"weights": weights, "optimizer": moments, "state": {"trainable": ["projector.weight"]}}
    folders, earlier = (case.folder / f"step={step}" for step in count()), None

    def save() -> None:
        nonlocal earlier
        before, earlier = earlier, checkpoint.save(next(folders), contents, lambda folder: None, earlier)
        if before is not None:
            shutil.rmtree(before.file.parent)

    return lambda: clocked(save)[1]


def theirs_partly_trained(case: Case):
    import torch

    weights, moments = ({name: torch.randn(shape) for name, shape in part.items()} for part in partly_trained(case))
    return lambda: clocked(torch.save, {"weights": weights, "optimizer": moments}, case.folder / "checkpoint.pt")[1]
