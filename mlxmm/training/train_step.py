"""One optimizer update: loss -> gradients -> clip -> update, compiled.

A micro-batch counts in proportion to its `weight`, so the update is the one a single large batch would have given,
however the examples were split (over micro-batches, over processes). Sums are added up; means are made once.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxmm.compute.compiled import Compiler, snapshot
from mlxmm.compute.precision import autocast
from mlxmm.distributed import collectives
from mlxmm.errors import warn
from mlxmm.training.batches import num_examples
from mlxmm.training.index_check import IndexCheck
from mlxmm.training.randomness import isolated_random_state
from mlxmm.training.step_errors import check_outputs, check_same_names, explained
from mlxmm.training.strategy import REPLICATED, Replicated
from mlxmm.training.trainable import frozen_parts_unchanged


class TrainStep:
    """`step(batches) -> metrics`: one update from the micro-batches of `batches`.

    Compiling captures what is trainable, the training modes and the state dicts as they are now: make a new one
    after any of them is changed or replaced. With `on_gradients(grads)` the update is a second compiled function,
    so that Python sees real gradients in between.
    """

    def __init__(
        self,
        module,
        optimizer,
        config,
        compiler: Compiler,
        strategy: Replicated = REPLICATED,
        on_gradients: Callable | None = None,
    ):
        self.module, self.optimizer, self.config = module, optimizer, config
        self.strategy, self.on_gradients = strategy, on_gradients
        self._indices = IndexCheck(module, module.training_step)
        self._loss_and_grad = nn.value_and_grad(module, self._loss)
        self._sums_and_grad = nn.value_and_grad(module, self._weighted_loss)
        optimizers = getattr(optimizer, "optimizers", [optimizer])
        compiled = partial(compiler, state=[module.state, optimizer.state, mx.random.state], others=optimizers)
        self._compiled_whole, self._compiled_gradients = compiled(self._whole), compiled(self._gradients)
        self._compiled_accumulate, self._compiled_average = compiled(self._accumulate), compiled(self._average)
        self._compiled_finish = compiled(lambda total: self._update(*self._average(total)))
        self._compiled_update = compiled(self._update)

    def __call__(self, batches: tuple) -> dict[str, mx.array]:
        if len(batches) == 1:
            self._indices.check(batches[0])
        if self.on_gradients is None:
            if len(batches) == 1:
                return self._compiled_whole(batches[0])
            return self._compiled_finish(self._total(batches))
        if len(batches) == 1:
            metrics, grads = self._compiled_gradients(batches[0])
        else:
            metrics, grads = self._compiled_average(self._total(batches))
        self.on_gradients(grads)
        return self._compiled_update(metrics, grads)

    def _total(self, batches: tuple) -> dict:
        """Sums and gradients of all micro-batches, one after another."""
        total = None
        for batch in batches:
            self._indices.check(batch)
            mx.eval(total)  # finish, and free, one micro-batch before starting the next
            total = self._compiled_accumulate(batch, total)
        return total

    # ---- what is compiled

    def _whole(self, batch):
        """The usual case, an update from one micro-batch, in one compiled function."""
        (_, (measured, weight)), grads = self._loss_and_grad(batch)
        if collectives.world_size() == 1:
            return self._update(measured, grads, weight)
        return self._update(*self._averaged(measured, counted(grads, weight)))

    def _gradients(self, batch):
        (_, (measured, weight)), grads = self._loss_and_grad(batch)
        return self._averaged(measured, counted(grads, weight))

    def _accumulate(self, batch, total):
        (_, sums), grads = self._sums_and_grad(batch)
        return add_sums(total, {"sums": sums, "grads": counted(grads, sums["weight"])})

    def _average(self, total):
        return average_sums(total["sums"], total["grads"], all_sum=self.strategy.all_sum)

    def _update(self, metrics, grads, weight: mx.array | None = None):
        """Clip, update, and add the gradients' norm to the metrics. With the `weight` of their batch, the gradients are
        `counted` after they were clipped: the update's kernel does it, which spares a pass over them all."""
        norm = global_norm(grads, self.strategy)
        metrics["grad_norm"] = norm = counted(norm, weight)
        if self.config.gradient_clip_val:
            grads = clip(grads, norm, self.config.gradient_clip_val, self.config.gradient_clip_algorithm)
        self.optimizer.update(self.module, counted(grads, weight))
        self.module.after_update()
        return metrics

    # ---- the loss of a micro-batch, and what the module measured beside it

    def _weighted_loss(self, batch):
        step = self.module.training_step
        with self._step_of(batch), explained(step, batch):
            sums = weighted_sums(check_outputs(step, step(batch), needs_loss=True), num_examples(batch))
        return sums["loss"], sums

    def _loss(self, batch):
        """Means of one process; sums of several, which `_averaged` divides. A lone process spares that division."""
        step = self.module.training_step
        with self._step_of(batch), explained(step, batch):
            outputs = check_outputs(step, step(batch), needs_loss=True)
        is_alone = collectives.world_size() == 1
        sums = weighted_sums(outputs, 1 if is_alone else num_examples(batch))
        measured = average_sums(sums)[0] if is_alone else sums
        return measured["loss"], (measured, sums["weight"] if "weight" in outputs else None)

    @contextlib.contextmanager
    def _step_of(self, batch) -> Iterator[None]:
        """Within the block, the module's training step is run, or traced, on `batch`."""
        module = self.module
        with frozen_parts_unchanged(module), autocast(module, self.config.precision), self._indices.noted(batch):
            yield

    def _averaged(self, measured, grads):
        if collectives.world_size() == 1:
            return measured, grads
        return self._average({"sums": measured, "grads": grads})


def build_eval_step(module, step: Callable, config, compiler: Compiler) -> Callable:
    """Return `eval_step(batch) -> sums`: the weighted sums of what `step` measures on a batch."""

    indices = IndexCheck(module, step)

    def eval_step(batch):
        with autocast(module, config.precision), indices.noted(batch), explained(step, batch):
            return weighted_sums(check_outputs(step, step(batch), needs_loss=False), num_examples(batch))

    compiled = compiler(eval_step, state=[module.state, mx.random.state])

    def checked_step(batch):
        indices.check(batch)
        return compiled(batch)

    return checked_step


def checked_twice(train_step: Callable, module, optimizer) -> Callable:
    """`train_step` that computes its first update twice. Raises `RuntimeError` where the two differ by a bit."""
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


def weighted_sums(outputs: dict, num_examples: int) -> dict:
    """Turn a batch's means into sums, which is what can be added across batches. It counts by its "weight", or else by
    its examples. Of a batch of weight 0, whose means may be anything, they are 0."""
    weight = mx.array(outputs.get("weight", num_examples), dtype=mx.float32)
    sums = {name: mean * weight for name, mean in outputs.items() if name != "weight"}
    if "weight" in outputs:
        sums = {name: mx.where(weight == 0, 0, total) for name, total in sums.items()}
    # MLX cannot compile a gradient beside two results that are computed alike (0.32): slices are never alike.
    if others := [name for name in sums if name != "loss"]:
        sums |= zip(others, mx.stack([sums[name] for name in others]))
    return sums | {"weight": weight}


def counted(grads, weight: mx.array | None):
    """The gradients of a batch; zeros where its `weight` is 0, since those of a mean of nothing may be nan. A step that
    returns no weight, None, spares the pass over them."""
    return grads if weight is None else tree_map(lambda grad: mx.where(weight == 0, 0, grad), grads)


def add_sums(total: dict | None, sums: dict) -> dict:
    """Add the sums of a batch to those of the batches before it; `total` is None for the first batch."""
    if total is None:
        return sums
    check_same_names(total.get("sums", total), sums.get("sums", sums))
    return tree_map(mx.add, total, sums)


def fill_empty_sums(total: dict | None) -> dict | None:
    """On a rank without batches, zeros under the other ranks' names; None if no rank had any that counts."""
    ranks = collectives.all_gather_object((list(total or ()), float(total["weight"]) if total else 0.0))
    names = next((names for names, _ in ranks if names), ())
    if names and not any(weight for _, weight in ranks):
        warn("all batches of this evaluation have weight 0: nothing was measured")
        return None
    return total or ({name: mx.array(0.0) for name in names} or None)


def average_sums(sums: dict, *trees, all_sum: Callable = collectives.all_sum):
    """Divide sums, and trees of sums, by the weight of all processes: the one place where means are made."""
    sums, *trees = all_sum([sums, *trees])
    weight = mx.where(sums["weight"] == 0, 1, sums["weight"])
    means = {name: total / weight for name, total in sums.items() if name != "weight"}
    return (means, *(tree_map(lambda x: x / weight.astype(x.dtype), tree) for tree in trees))


def clip(grads, norm: mx.array, limit: float, algorithm: str):
    """Scale all gradients so that their `norm` is at most `limit`; or, with "value", bound each number by it."""
    if algorithm == "value":
        return tree_map(lambda g: mx.clip(g, -limit, limit), grads)
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * scale.astype(g.dtype), grads)


def global_norm(grads, strategy: Replicated = REPLICATED) -> mx.array:
    """The length of all gradients as one vector, in float32: squares of half-precision floats overflow."""
    squares = {name: mx.square(grad.astype(mx.float32)).sum() for name, grad in tree_flatten(grads)}
    return mx.sqrt(strategy.sum_over_parameters(squares))
