"""Time and memory of a language model's head with its loss: MLX's own, and fused (mlxmm/losses.py).

    python tools/benchmark_head.py --vocabularies 2000 8192 32768 151936 --repeats 3
    python tools/benchmark_head.py --vocabularies 151936 --heads frozen --chunk-logits 16777216 33554432

All are compiled and run in turns, and the shortest of the repeats counts. The plain form, nn.losses.cross_entropy over
the logits of all positions, holds some 7 GB at 151,936. On a busy machine --cpu-time with one thread of BLAS tells more
than the clock.
"""

import argparse
import time

import mlx.core as mx
import mlx.nn as nn

from mlxmm import losses
from mlxmm.losses import linear_token_loss, token_accuracy


def plain(states, weight, targets, mask):
    logits = states @ weight.T
    loss = (nn.losses.cross_entropy(logits, targets) * mask).sum() / mask.sum()
    return loss, token_accuracy(logits, targets, mask)


def measure(step, arrays, clock) -> tuple[float, float]:
    """Seconds, and MB above what was there before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), clock()
    mx.eval(step(*arrays))
    return clock() - start, (mx.get_peak_memory() - before) / 1e6


def fused(chunk: int, trained: bool):
    """The fused form with so many logits at a time: read when it is compiled, on its first call."""

    def loss(*arrays):
        losses.CHUNK_LOGITS = chunk
        return linear_token_loss(*arrays, for_weight=trained)

    return loss


def compare(vocabulary: int, args, trained: bool) -> None:
    mx.random.seed(0)
    states, weight = mx.random.normal((args.positions, args.width)), 0.03 * mx.random.normal((vocabulary, args.width))
    targets, mask = mx.random.randint(0, vocabulary, (args.positions,)), mx.ones(args.positions)
    mx.eval(states, weight, targets, mask)
    of = (0, 1) if trained else 0
    forms = {0: plain} | {chunk: fused(chunk, trained) for chunk in args.chunk_logits}
    steps = {chunk: mx.compile(mx.value_and_grad(form, argnums=of)) for chunk, form in forms.items()}
    best = {chunk: (float("inf"), 0.0) for chunk in steps}
    clock = time.process_time if args.cpu_time else time.perf_counter
    for i in range(args.repeats + 1):  # the first compiles
        for chunk, step in steps.items():
            found = measure(step, (states, weight, targets, mask), clock)
            best[chunk] = min(best[chunk], found) if i else best[chunk]
    slow, much = best.pop(0)
    for chunk, (fast, little) in best.items():
        print(
            f"| {vocabulary:,} | {'trained' if trained else 'frozen'} | {chunk // vocabulary:,} "
            f"| {slow:.3f} | {fast:.3f} | {slow / fast:.2f} | {much:,.0f} | {little:,.0f} | {much / little:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[2_000, 8_192, 32_768, 151_936])
    parser.add_argument("--width", type=int, default=1_024, help="features of a position")
    parser.add_argument("--positions", type=int, default=48 * 32)
    parser.add_argument("--heads", nargs="+", choices=["frozen", "trained"], default=["frozen", "trained"])
    parser.add_argument("--chunk-logits", type=int, nargs="+", default=[losses.CHUNK_LOGITS], help="held at a time")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="count the CPU's seconds, not the clock's")
    args = parser.parse_args()
    print("| V | head | positions a chunk | plain s | fused s | times faster | plain MB | fused MB | times less |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for vocabulary in args.vocabularies:
        for head in args.heads:
            compare(vocabulary, args, head == "trained")


if __name__ == "__main__":
    main()
