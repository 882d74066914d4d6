"""Saving 100 million parameters of float32 to a file that is whole or absent: weights alone."""

from tools.bench.child import Case, clocked

SHAPES = [(1_000, 10_000)] * 10


def ours(case: Case):
    import mlx.core as mx

    from mlxmm.storage import checkpoint

    weights = {f"layers.{i}.weight": mx.random.normal(shape) for i, shape in enumerate(SHAPES)}
    mx.eval(weights)
    contents = {"weights": weights, "state": {}}
    return lambda: clocked(checkpoint.save, case.folder / "checkpoint", contents, lambda folder: None)[1]


def theirs(case: Case):
    import torch

    weights = {f"layers.{i}.weight": torch.randn(shape) for i, shape in enumerate(SHAPES)}
    return lambda: clocked(torch.save, weights, case.folder / "checkpoint.pt")[1]
