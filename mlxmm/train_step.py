"""One optimizer update: loss -> gradients -> clip -> update, compiled.

A micro-batch counts in proportion to its `weight`, so the update is the one a single large batch would have
given, however the examples were split (over micro-batches, over processes).
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxmm import distributed


def build_train_step(module, optimizer, config, on_gradients: Callable | None = None) -> Callable:
    """Return `train_step(batches) -> metrics`: one update from a few micro-batches.

    Compiling captures what is trainable, the training modes and the state dicts as they are now: build again
    after any of them is changed or replaced. With `on_gradients(grads)` the update is a second compiled
    function, so that Python sees real gradients in between.
    """

    def weighted_loss(batch):
        sums = weighted_sums(module.training_step(batch))
        return sums["loss"], sums

    loss_and_grad = nn.value_and_grad(module, weighted_loss)

    def accumulate(batch, total):
        (_, sums), grads = loss_and_grad(batch)
        new = {"sums": sums, "grads": grads}
        return new if total is None else tree_map(mx.add, total, new)

    def average(total):
        means, grads = average_sums(total["sums"], total["grads"])
        return means, grads

    def update(metrics, grads):
        metrics["grad_norm"] = norm = global_norm(grads)
        if config.gradient_clip_val is not None:
            scale = mx.minimum(config.gradient_clip_val / (norm + 1e-6), 1.0)
            grads = tree_map(lambda g: g * scale.astype(g.dtype), grads)
        optimizer.update(module, grads)
        module.after_update()
        return metrics

    state = [module.state, optimizer.state, mx.random.state]
    compiled = partial(mx.compile, inputs=state, outputs=state) if config.compile else lambda f: f
    accumulate_alone, average_alone, update_alone = compiled(accumulate), compiled(average), compiled(update)
    finish = compiled(lambda total: update(*average(total)))
    whole = compiled(lambda batch: update(*average(accumulate(batch, None))))

    def train_step(batches):
        if len(batches) == 1 and on_gradients is None:
            return whole(batches[0])
        total = None
        for batch in batches:
            mx.eval(total)  # finish, and free, one micro-batch before starting the next
            total = accumulate_alone(batch, total)
        if on_gradients is None:
            return finish(total)
        metrics, grads = average_alone(total)
        on_gradients(grads)
        return update_alone(metrics, grads)

    return train_step


def build_eval_step(module, step: Callable, config) -> Callable:
    """Return `eval_step(batch, total) -> total`: adds the weighted sums of one batch to those before it."""

    def add(batch, total):
        sums = weighted_sums(step(batch))
        return sums if total is None else tree_map(mx.add, total, sums)

    state = [module.state, mx.random.state]
    return mx.compile(add, inputs=state, outputs=state) if config.compile else add


def weighted_sums(outputs: dict) -> dict:
    """Turn a batch's means into sums, which is what can be added across batches."""
    weight = mx.array(outputs.get("weight", 1.0), dtype=mx.float32)
    return {name: mean * weight for name, mean in outputs.items() if name != "weight"} | {"weight": weight}


def average_sums(sums: dict, *trees):
    """Divide sums, and trees of sums, by the weight of all processes: the one place where means are made."""
    sums, *trees = distributed.all_sum([sums, *trees])
    weight = sums["weight"]
    means = {name: total / weight for name, total in sums.items() if name != "weight"}
    return (means, *(tree_map(lambda x: x / weight.astype(x.dtype), tree) for tree in trees))


def global_norm(grads) -> mx.array:
    """The length of all gradients as one vector, in float32 (squares of half floats overflow)."""
    squares = [mx.square(grad.astype(mx.float32)).sum() for _, grad in tree_flatten(grads)]
    return mx.sqrt(sum(squares, mx.array(0.0)))
