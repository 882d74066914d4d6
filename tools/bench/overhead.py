"""What a Trainer adds to a step that is nearly free, as tools/benchmark_overhead.py measures it."""

from tools.bench.child import Case


def _turn(case: Case, run):
    from tools.benchmark_overhead import SIZES, make_batches, mean_us

    width, depth, rows = SIZES["nearly free"]
    batches = make_batches(width, rows, 200 if case.quick else 400)

    def turn() -> dict:
        watch = run(width, depth, batches)
        bare = mean_us(watch.bare_times)
        return {"added_us": mean_us(watch.fit_times) - bare, "bare_us": bare}

    return turn


def ours(case: Case):
    from tools.benchmark_overhead import run_mlxmm

    return _turn(case, run_mlxmm)


def theirs(case: Case):
    import warnings

    import lightning  # noqa: F401

    from tools.benchmark_overhead import run_lightning

    warnings.simplefilter("ignore")
    return _turn(case, run_lightning)
