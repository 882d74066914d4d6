"""GradCache (arXiv 2101.06983): the features of a large batch, and their gradient, in the memory of a chunk.

A contrastive loss is not a sum over chunks, because every example is every other's negative. But once the gradient of
the loss with respect to the features is known, the gradient of the parameters is a sum over chunks: the features of
each chunk are computed a second time, with the activations that their gradient needs, and freed again.

B examples, D features.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxmm.compute.dropout import dropout_from
from mlxmm.compute.layer_calls import replaced_calls, replaced_parameters


@contextlib.contextmanager
def chunked_calls(
    parts: Mapping[str, nn.Module], size: int, prepare: Mapping[str, Callable[[mx.array], mx.array]]
) -> Iterator[None]:
    """Within the block, each of `parts` computes its inputs in chunks of `size`, with the gradient of the whole batch.

    `prepare[name]` is applied to each chunk first, because its result for the whole batch might be too large.
    """

    def wrap(name, call):
        prepared = prepare.get(name, lambda chunk: chunk)
        return lambda self, inputs: call_in_chunks(self, lambda part, chunk: call(part, prepared(chunk)), inputs, size)

    with replaced_calls(parts, wrap):
        yield


def call_in_chunks(
    module: nn.Module, call: Callable[[nn.Module, mx.array], mx.array], inputs: mx.array, size: int
) -> mx.array:
    """`call(module, inputs)`, (B, D), with the activations of one chunk at a time in memory, forward and backward.

    Only `module`'s trainable parameters get gradients. Dropout and patch dropout use a random key for each chunk, so
    that both passes drop the same.
    """
    everything, parameters = module.parameters(), module.trainable_parameters()
    starts = range(0, len(inputs), size)
    keys = mx.random.randint(0, 2**31 - 1, (len(starts), 2), dtype=mx.uint32)

    def encode(parameters, i: int, after: list[mx.array]) -> mx.array:
        # Without `depends` MLX would compute all chunks at the same time.
        chunk = mx.depends(inputs[starts[i] : starts[i] + size], after) if after else inputs[:size]
        with replaced_parameters(module, everything, parameters), dropout_from(module, keys[i]):
            return call(module, chunk)

    def features(parameters) -> mx.array:
        parts = []
        for i in range(len(starts)):
            parts.append(encode(parameters, i, parts[-1:]))
        return mx.concatenate(parts)

    def along(parameters, i: int, after: list[mx.array], cotangent: mx.array) -> mx.array:
        return (encode(parameters, i, after) * cotangent).sum()

    def gradient(parameters, cotangent, _):
        total = None
        for i, start in enumerate(starts):
            after = [array for _, array in tree_flatten(total or cotangent)]
            grads = mx.grad(along)(parameters, i, after, cotangent[start : start + size])
            total = grads if total is None else tree_map(mx.add, total, grads)
        return total

    cached = mx.custom_function(features)
    cached.vjp(gradient)
    return cached(parameters)
