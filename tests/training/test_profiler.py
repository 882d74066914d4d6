"""Where the time goes: phases add up, and Metal's capture is opened and closed once."""

import time

import mlx.core as mx
import pytest

from mlxmm.errors import UserError
from mlxmm.training.profiler import CAPTURED, MetalProfiler, Profiler, make_profiler


def test_a_phase_does_not_count_what_the_phases_inside_it_take():
    profiler = Profiler()
    start = time.perf_counter()
    with profiler.phase("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with profiler.phase("inner"):
                time.sleep(0.03)
    total = time.perf_counter() - start
    assert 0.06 <= profiler.seconds["inner"] and 0.02 <= profiler.seconds["outer"] <= total - profiler.seconds["inner"]
    assert sum(profiler.seconds.values()) == pytest.approx(total, rel=0.05) and profiler.counts["inner"] == 2
    assert profiler.table().splitlines()[1].startswith("inner")


@pytest.mark.skipif(mx.metal.is_available(), reason="there is Metal")
def test_without_metal_its_capture_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="profiler=simple runs anywhere"):
        make_profiler("metal", tmp_path)


@pytest.mark.parametrize("num_updates", [2, 4, 9])
def test_a_few_updates_are_captured_and_the_capture_is_closed_however_short_the_run(tmp_path, monkeypatch, num_updates):
    calls = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.metal, "start_capture", calls.append)
    monkeypatch.setattr(mx.metal, "stop_capture", lambda: calls.append("stop"))
    profiler = MetalProfiler(tmp_path / "x.gputrace")
    for _ in range(num_updates):
        with profiler.phase("step"), profiler.phase("data"):
            pass
    profiler.table()
    assert calls == ([str(tmp_path / "x.gputrace"), "stop"] if num_updates > CAPTURED.start else [])
