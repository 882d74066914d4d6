"""The head of a vocabulary of 151,936 with its loss, frozen: fused against logits of all positions at once.

48 x 32 positions of 512 features; with --quick, 24 x 32.
"""

from tools.bench.child import Case, clocked


def _turn(case: Case, loss):
    import mlx.core as mx

    vocabulary, width, positions = 151_936, 512, 768 if case.quick else 1_536
    mx.random.seed(0)
    states, weight = mx.random.normal((positions, width)), 0.03 * mx.random.normal((vocabulary, width))
    arrays = states, weight, mx.random.randint(0, vocabulary, (positions,)), mx.ones(positions)
    mx.eval(arrays)
    step = mx.compile(mx.value_and_grad(loss))

    def turn() -> dict:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        (value, _), gradient = step(*arrays)
        _, seconds = clocked(mx.eval, value, gradient)
        return seconds | {"mb": (mx.get_peak_memory() - before) / 1e6, "check": [value.item()]}

    return turn


def ours(case: Case):
    from functools import partial

    from mlxmm.losses import linear_token_loss

    return _turn(case, partial(linear_token_loss, for_weight=False))


def theirs(case: Case):
    from tools.benchmark_head import plain

    return _turn(case, plain)
