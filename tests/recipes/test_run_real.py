"""The clock of `make real`: phases are measured once each, however they are nested."""

import threading
import time

import mlx.core as mx
import pytest

from tools.phases import Phases


def test_a_phase_within_another_is_not_counted_twice():
    phases, start = Phases("start", elapsed=1.0), time.perf_counter()
    with phases.phase("outer"):
        time.sleep(0.05)
        with phases.phase("inner"):
            time.sleep(0.1)
        time.sleep(0.05)
    phases.end_stretch()
    seconds = {name: phase.seconds for name, phase in phases.records.items()}
    assert seconds["inner"] == pytest.approx(0.1, abs=0.05) and seconds["outer"] == pytest.approx(0.1, abs=0.05)
    assert sum(seconds.values()) == pytest.approx(1.0 + time.perf_counter() - start, abs=0.01)


def test_a_phase_that_fails_ends():
    phases = Phases("start")
    with pytest.raises(ValueError), phases.phase("failing"):
        raise ValueError
    time.sleep(0.02)
    phases.end_stretch()
    assert phases.records["start"].seconds >= 0.02


def test_each_phase_has_the_peak_of_its_own_memory():
    phases = Phases("start")
    phases.timed("large", lambda: mx.eval(mx.zeros(1 << 22) + 1))()
    phases.timed("small", lambda: mx.eval(mx.zeros(8) + 1))()
    assert phases.records["large"].mlx_peak >= 1 << 24 > phases.records["small"].mlx_peak
    assert phases.records["small"].resident_peak > 1 << 20


def test_another_thread_does_not_disturb_the_phase_at_hand():
    phases = Phases("start")
    with phases.phase("training"):
        thread = threading.Thread(target=phases.timed_aside("writing", lambda: time.sleep(0.05)))
        thread.start()
        thread.join()
    assert min(phases.records[name].seconds for name in ("training", "writing")) >= 0.05
