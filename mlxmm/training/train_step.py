"""One optimizer update: loss -> gradients -> clip -> update, compiled.

A micro-batch counts in proportion to its `weight`, so the update is the one a single large batch would have
given, however the examples were split (over micro-batches, over processes).
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxmm.compute.compiled import Compiler, snapshot
from mlxmm.compute.precision import autocast
from mlxmm.distributed import collectives
from mlxmm.training.randomness import isolated_random_state
from mlxmm.training.strategy import Shards

REPLICATED = Shards()


def build_train_step(
    module,
    optimizer,
    config,
    compiler: Compiler,
    on_gradients: Callable | None = None,
    shards: Shards = REPLICATED,
) -> Callable:
    """Return `train_step(batches) -> metrics`: one update from a few micro-batches.

    Compiling captures what is trainable, the training modes and the state dicts as they are now: build again
    after any of them is changed or replaced. With `on_gradients(grads)` the update is a second compiled
    function, so that Python sees real gradients in between.
    """
    compiled = partial(compiler, state=[module.state, optimizer.state, mx.random.state])
    average = partial(_average, shards=shards)
    gradients, accumulate = _gradient_functions(module, config, average)
    update = _update_function(module, optimizer, config, shards)
    whole, finish = compiled(lambda batch: update(*gradients(batch))), compiled(lambda total: update(*average(total)))
    gradients_alone, accumulate_alone = compiled(gradients), compiled(accumulate)
    average_alone, update_alone = compiled(average), compiled(update)

    def train_step(batches):
        if len(batches) == 1 and on_gradients is None:
            return whole(batches[0])
        if len(batches) == 1:
            metrics, grads = gradients_alone(batches[0])
        else:
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


def _gradient_functions(module, config, average: Callable) -> tuple[Callable, Callable]:
    """`gradients(batch) -> (means, grads)` of a lone micro-batch, and `accumulate(batch, total)` of one among more."""
    step = autocast(module, module.training_step, config.precision)

    def weighted_loss(batch):
        sums = weighted_sums(step(batch))
        return sums["loss"], sums

    def mean_loss(batch):
        (means,) = average_sums(weighted_sums(step(batch)))
        return means["loss"], means

    def accumulate(batch, total):
        (_, sums), grads = nn.value_and_grad(module, weighted_loss)(batch)
        return add_sums(total, {"sums": sums, "grads": grads})

    def gradients(batch):
        if collectives.world_size() > 1:
            return average(accumulate(batch, None))
        (_, means), grads = nn.value_and_grad(module, mean_loss)(batch)  # spares a division of every gradient
        return means, grads

    return gradients, accumulate


def _update_function(module, optimizer, config, shards: Shards) -> Callable:
    """`update(metrics, grads) -> metrics`: clip, update, and the gradients' norm among the metrics."""

    def update(metrics, grads):
        metrics["grad_norm"] = norm = global_norm(grads, shards)
        if config.gradient_clip_val is not None:
            grads = clip(grads, norm, config.gradient_clip_val, config.gradient_clip_algorithm)
        optimizer.update(module, grads)
        module.after_update()
        return metrics

    return update


def _average(total: dict, shards: Shards):
    return average_sums(total["sums"], total["grads"], all_sum=shards.all_sum)


def build_eval_step(module, step: Callable, config, compiler: Compiler) -> Callable:
    """Return `eval_step(batch) -> sums`: the weighted sums of what `step` measures on a batch."""
    step = autocast(module, step, config.precision)
    return compiler(lambda batch: weighted_sums(step(batch)), state=[module.state, mx.random.state])


def checked_twice(train_step: Callable, module, optimizer) -> Callable:
    """`train_step` that computes its first update twice, and raises where the two differ by a bit."""
    checked = False

    def run(batches):
        nonlocal checked
        if not checked:
            checked = True
            restore = snapshot([module.state, optimizer.state])
            with isolated_random_state():
                mx.eval(train_step(batches), module.state)
            first = tree_flatten(module.parameters())
            restore()
            metrics = train_step(batches)
            for (name, once), (_, twice) in zip(first, tree_flatten(module.parameters())):
                if not mx.array_equal(once, twice, equal_nan=True).item():
                    raise RuntimeError(f"deterministic: the same update, computed twice, gave two values of {name}")
            return metrics
        return train_step(batches)

    return run


def weighted_sums(outputs: dict) -> dict:
    """Turn a batch's means into sums, which is what can be added across batches."""
    weight = mx.array(outputs.get("weight", 1.0), dtype=mx.float32)
    return {name: mean * weight for name, mean in outputs.items() if name != "weight"} | {"weight": weight}


def add_sums(total: dict | None, sums: dict) -> dict:
    """Add the sums of a batch to those before it, if there were any."""
    return sums if total is None else tree_map(mx.add, total, sums)


def fill_empty_sums(total: dict | None) -> dict | None:
    """`total`; or zeros by the same names, where only other processes had batches. None where none had any."""
    names = next((names for names in collectives.all_gather_object(list(total or ())) if names), None)
    return total or (names and {name: mx.array(0.0) for name in names})


def average_sums(sums: dict, *trees, all_sum: Callable = collectives.all_sum):
    """Divide sums, and trees of sums, by the weight of all processes: the one place where means are made."""
    sums, *trees = all_sum([sums, *trees])
    weight = sums["weight"]
    means = {name: total / weight for name, total in sums.items() if name != "weight"}
    return (means, *(tree_map(lambda x: x / weight.astype(x.dtype), tree) for tree in trees))


def clip(grads, norm: mx.array, most: float, algorithm: str):
    """Scale all gradients so that their `norm` is at most `most`; or, by "value", bound each number."""
    if algorithm == "value":
        return tree_map(lambda g: mx.clip(g, -most, most), grads)
    scale = mx.minimum(most / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * scale.astype(g.dtype), grads)


def global_norm(grads, shards: Shards = REPLICATED) -> mx.array:
    """The length of all gradients as one vector, in float32 (squares of half floats overflow)."""
    squares = {name: mx.square(grad.astype(mx.float32)).sum() for name, grad in tree_flatten(grads)}
    return mx.sqrt(shards.total(squares))
