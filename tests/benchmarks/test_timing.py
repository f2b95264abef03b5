"""Interleaving, quantiles and memory measurement, with clocks that the test winds."""

import gc

import pytest

from benchmarks.harness import load, memory, timing
from benchmarks.harness.timing import Samples, interleave


class Clock:
    """A timer whose calls take what the test says, and that remembers who was timed."""

    def __init__(self, times_ms):
        self.times_ms, self.timed = times_ms, []

    def __call__(self, call):
        name = call()
        self.timed.append(name)
        return self.times_ms[name]


def test_every_round_times_every_candidate_in_a_new_order():
    clock = Clock({"a": 10.0, "b": 20.0, "c": 30.0})
    calls = {name: (lambda n=name: n) for name in clock.times_ms}
    samples = interleave(calls, 8, clock)
    assert {n: s.times_ms for n, s in samples.items()} == {
        n: 8 * [t] for n, t in clock.times_ms.items()
    }
    timed = clock.timed[3:]  # after one estimate each
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2


def test_the_same_seed_gives_the_same_orders():
    orders = []
    for seed in (1, 1, 2):
        clock = Clock({"a": 10.0, "b": 10.0, "c": 10.0})
        interleave({n: (lambda n=n: n) for n in "abc"}, 6, clock, seed=seed)
        orders.append(clock.timed)
    assert orders[0] == orders[1] != orders[2]


def test_short_calls_are_repeated_to_fill_a_sample():
    clock = Clock({"short": 0.5, "long": 5.0})
    interleave({n: (lambda n=n: n) for n in clock.times_ms}, 2, clock, min_sample_ms=2.0)
    assert clock.timed.count("short") == 1 + 2 * 4
    assert clock.timed.count("long") == 1 + 2


def test_a_slow_machine_gets_fewer_rounds(monkeypatch):
    seconds = iter(range(100))  # of a clock that moves a second a look
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(seconds))
    samples = interleave({"a": lambda: "a"}, 50, Clock({"a": 4.0}), budget_s=0.5)
    assert len(samples["a"].times_ms) == timing.LEAST_ROUNDS
    samples = interleave({"a": lambda: "a"}, 50, Clock({"a": 4.0}), budget_s=10.5)
    assert len(samples["a"].times_ms) == timing.LEAST_ROUNDS + 10


def test_an_interrupted_run_keeps_its_samples():
    taken = {}

    def interrupt():
        if len(taken["a"].times_ms) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": lambda: "a"}, 10, Clock({"a": 4.0}), on_round=interrupt, into=taken)
    assert taken["a"].times_ms == [4.0, 4.0, 4.0]
    assert gc.isenabled()


def test_quantiles():
    samples = Samples([5.0, 1.0, 3.0, 2.0, 4.0])
    found = samples.to_json()
    assert (found["min_ms"], found["median_ms"], found["max_ms"]) == (1.0, 3.0, 5.0)
    assert (found["q1_ms"], found["q3_ms"], found["samples"]) == (2.0, 4.0, 5)
    assert samples.quantile_ms(0.1) == pytest.approx(1.4)


def test_geometric_mean():
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_wall_time_is_in_milliseconds():
    assert 0 <= timing.time_wall(lambda: None) < 100


MIB = 1 << 20
GROWTH = """
import torch
from benchmarks.harness import memory
def held():
    scratch = [torch.zeros(8 << 18) for _ in range(2)]   # 8 MiB each
    del scratch
    return [torch.zeros(4 << 18)]
print(memory.beside_results_bytes(held, memory.rss_growth_bytes))
"""


@pytest.mark.skipif(not memory.can_measure_cpu(), reason="no /proc/self/clear_refs on this system")
def test_resident_memory_is_measured_beside_results(tmp_path, monkeypatch):
    """16 MiB of scratch are seen, in a fresh process, although they are freed before the end."""
    (tmp_path / "growing.py").write_text(GROWTH)
    monkeypatch.syspath_prepend(tmp_path)
    found = memory.run_fresh("growing", [])
    # the result may take the place of the scratch, so its 4 MiB may have been taken off
    assert 11.5 * MIB < found < 16.8 * MIB


def test_a_failing_child_says_why(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("raise SystemExit('no such case')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="no such case"):
        memory.run_fresh("failing", [])


def test_others_load_is_what_is_left_of_the_machines(monkeypatch):
    """In 10 s the machine was busy for 12 s of CPU time, of which 9 were our own."""
    clock = {"now": 100.0, "busy": 50.0, "own": 5.0}
    monkeypatch.setattr(load.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(load, "busy_s", lambda: clock["busy"])
    monkeypatch.setattr(load, "own_s", lambda: clock["own"])
    watch = load.LoadWatch()
    clock.update(now=110.0, busy=62.0, own=14.0)
    assert watch.others_cores() == pytest.approx(0.3)
    assert "used 0.30 of 2 cores" in watch.note(2)
    clock.update(own=16.9)
    assert watch.note(2) == ""
