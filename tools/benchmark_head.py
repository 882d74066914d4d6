"""Time and memory of a language model's head with its loss: plain, and fused (mlxmm/losses.py).

    python tools/benchmark_head.py --vocabularies 2000 8192 32768 151936 --repeats 3

Both are compiled and run in turns, and the shortest of the repeats counts. The plain form holds all logits: some 7 GB
at 151,936.
"""

import argparse
import time
from functools import partial

import mlx.core as mx

import mlxmm  # noqa: F401  (a fast BLAS)
from mlxmm.losses import linear_token_loss, token_accuracy, token_loss


def plain(states, weight, targets, mask):
    logits = states @ weight.T
    return token_loss(logits, targets, mask), token_accuracy(logits, targets, mask)


def measure(step, *arrays) -> tuple[float, float]:
    """Seconds, and MB above what was there before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), time.perf_counter()
    mx.eval(step(*arrays))
    return time.perf_counter() - start, (mx.get_peak_memory() - before) / 1e6


def compare(vocabulary: int, args, trained: bool) -> None:
    mx.random.seed(0)
    states, weight = mx.random.normal((args.positions, args.width)), 0.03 * mx.random.normal((vocabulary, args.width))
    targets, mask = mx.random.randint(0, vocabulary, (args.positions,)), mx.ones(args.positions)
    mx.eval(states, weight, targets, mask)
    of = (0, 1) if trained else 0
    forms = {"plain": plain, "fused": partial(linear_token_loss, for_weight=trained)}
    steps = {name: mx.compile(mx.value_and_grad(form, argnums=of)) for name, form in forms.items()}
    best = {name: (float("inf"), 0.0) for name in steps}
    for i in range(args.repeats + 1):  # the first compiles
        for name, step in steps.items():
            found = measure(step, states, weight, targets, mask)
            best[name] = min(best[name], found) if i else best[name]
    (slow, much), (fast, little) = best["plain"], best["fused"]
    head = "trained" if trained else "frozen"
    print(
        f"| {vocabulary:,} | {head} | {slow:.3f} | {fast:.3f} | {slow / fast:.2f} "
        f"| {much:,.0f} | {little:,.0f} | {much / little:.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[2_000, 8_192, 32_768, 151_936])
    parser.add_argument("--width", type=int, default=1_024, help="features of a position")
    parser.add_argument("--positions", type=int, default=48 * 32)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    print("| V | head | plain s | fused s | times faster | plain MB | fused MB | times less |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for vocabulary in args.vocabularies:
        for trained in (False, True):
            compare(vocabulary, args, trained)


if __name__ == "__main__":
    main()
