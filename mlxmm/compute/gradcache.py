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
from mlxmm.compute.layer_calls import call_with_written, replaced_calls, replaced_parameters
from mlxmm.compute.named_arrays import put_arrays, trainable_arrays


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
    that both passes drop the same. Running statistics are those of the chunks, one after another.
    """
    everything, parameters = module.parameters(), trainable_arrays(module)
    starts = range(0, len(inputs), size)
    keys = mx.random.randint(0, 2**31 - 1, (len(starts), 2), dtype=mx.uint32)

    def encode(parameters, i: int, after: list[mx.array], state: dict) -> tuple[mx.array, dict]:
        # Without `depends` MLX would compute all chunks at the same time.
        chunk = mx.depends(inputs[starts[i] : starts[i] + size], after) if after else inputs[:size]
        with replaced_parameters(module, everything, parameters), dropout_from(module, keys[i]):
            put_arrays(module, state)
            return call_with_written(module, lambda: call(module, chunk))

    def features(parameters) -> tuple[mx.array, dict]:
        parts, state = [], {}
        for i in range(len(starts)):
            part, written = encode(parameters, i, parts[-1:], state)
            parts, state = [*parts, part], state | written
        return mx.concatenate(parts), state

    def along(parameters, i: int, after: list[mx.array], cotangent: mx.array) -> mx.array:
        return (encode(parameters, i, after, {})[0] * cotangent).sum()

    def gradient(parameters, cotangents, _):
        total, cotangent = None, cotangents[0]
        for i, start in enumerate(starts):
            after = [array for _, array in tree_flatten(total or cotangent)]
            grads = mx.grad(along)(parameters, i, after, cotangent[start : start + size])
            total = grads if total is None else tree_map(mx.add, total, grads)
        return total

    cached = mx.custom_function(features)
    cached.vjp(gradient)
    outputs, written = cached(parameters)
    put_arrays(module, written)
    return outputs
