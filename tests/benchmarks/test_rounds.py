"""What the benchmarks share: who is timed how often, ratios within a round, intervals, the ceiling."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def rounds(root):
    """benchmarks/rounds.py as a module."""
    sys.path.insert(0, str(root / "benchmarks"))
    try:
        return importlib.import_module("rounds")
    finally:
        sys.path.pop(0)


def order(rounds, seed, reference="a", count=6):
    """Who was called, round by round."""
    called = []
    calls = {name: (lambda n=name: called.append(n)) for name in "abcd"}
    rounds.race(calls, count, reference, seed, warm_up=0)
    size = len(called) // count
    return [tuple(called[i : i + size]) for i in range(0, len(called), size)]


def test_the_reference_is_timed_as_often_as_all_others_together(rounds):
    times = rounds.race(dict.fromkeys("abcd", int), 5, "a", warm_up=2)
    assert [times[name].shape for name in "abcd"] == [(5, 3), (5, 1), (5, 1), (5, 1)]
    for turn in order(rounds, 0):
        assert turn.count("a") == 3 and sorted(turn) == sorted("aaabcd")


def test_the_order_is_drawn_anew_each_round_and_by_the_seed(rounds):
    assert len(set(order(rounds, 0))) > 1
    assert order(rounds, 0) == order(rounds, 0)
    assert order(rounds, 0) != order(rounds, 1)


def test_without_a_reference_all_are_timed_once(rounds):
    assert all(sorted(turn) == sorted("abcd") for turn in order(rounds, 0, None))


def test_an_unknown_reference_is_refused(rounds):
    with pytest.raises(ValueError, match="bare"):
        rounds.race({"a": int}, 1, "bare")


def test_each_time_goes_to_the_call_that_took_it(rounds):
    now = [0.0]
    calls = {name: (lambda s=spent: now.__setitem__(0, now[0] + s)) for name, spent in (("a", 1.0), ("b", 3.0))}
    times = rounds.race(calls, 4, "a", clock=lambda: now[0])
    assert np.allclose(times["a"], 1e3) and np.allclose(times["b"], 3e3)


def test_a_slow_round_changes_no_ratio(rounds):
    slow = np.array([1.0, 9.0, 1.0, 5.0])[:, None]
    found = rounds.ratio(2 * slow, slow * np.ones((1, 3)))
    assert found == (2.0, 2.0, 2.0)


def test_the_interval_holds_the_ratio_and_narrows_with_rounds(rounds):
    rng = np.random.default_rng(0)

    def between(count):
        old, new = (mean * rng.lognormal(0, 0.1, (count, 1)) for mean in (1.0, 1.5))
        found = rounds.ratio(new, old)
        assert found.low <= found.median <= found.high
        return found

    few, many = between(10), between(1000)
    assert many.low < 1.5 < many.high
    assert many.high - many.low < few.high - few.low


def test_the_ceiling_has_every_precision_and_says_which_way_is_the_fastest(rounds):
    found = rounds.ceiling(size=16, copied_bytes=1 << 16, seconds=0.0)
    assert set(found["gflop_per_second"]) == {"fp32", "bf16", "int8"}
    assert rounds.peak(found, "fp32") == max(r for r in found["gflop_per_second"]["fp32"].values() if r)
    assert rounds.peak(found, "fp32") > 0 and found["copy_gb_per_second"] > 0
    line = rounds.show(found)
    assert "fp32" in line and "GB/s" in line


def test_a_way_that_the_machine_has_not_is_null(rounds):
    found = {
        **{"gflop_per_second": {"fp32": {"torch": 10.0, "oneDNN": 20.0}, "int8": {"torch": None}}},
        **{"device": "cpu", "threads": 1, "copy_gb_per_second": 5.0},
    }
    assert (
        rounds.peak(found, "fp32") == 20.0 and rounds.peak(found, "int8") is None and rounds.peak(found, "fp8") is None
    )
    assert "(oneDNN)" in rounds.show(found) and "int8" not in rounds.show(found)


def test_the_machine_is_described(rounds):
    found = rounds.machine()
    assert found["cpu"] and isinstance(found["cpu_flags"], list) and found["cores"] >= 1
