"""Axes cover their values, bars count everything, labels stay apart, numbers on colours are readable."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.report import charts


@pytest.mark.parametrize(
    "trace",
    [
        [5.0],
        [5.0] * 100,
        [0.0, 0.0],
        [0.0, 1e-5],
        [1.0, 1.0 + 1e-12],
        [1.0, 2.0, 1e6],
        np.random.default_rng(1).lognormal(3, 1, 1000).tolist(),
        (100 + np.random.default_rng(2).normal(0, 0.01, 1000)).tolist(),
    ],
)
def test_histogram_counts_everything(trace: list[float]) -> None:
    edges, counts, overflow = charts.histogram(trace)
    assert sum(counts) + overflow == len(trace)
    assert len(edges) == len(counts) + 1 <= 60
    assert edges[0] <= min(trace)
    assert overflow <= 0.01 * len(trace) + 1
    np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0], rtol=1e-3)


@pytest.mark.parametrize(("low", "high"), [(0, 8), (79.3, 95.2), (-3, 12), (0.001, 0.0012), (0, 1e6)])
def test_ticks_cover_the_range(low: float, high: float) -> None:
    marks = charts.ticks(low, high)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 3 <= len(marks) <= 7


def test_labels_are_spread() -> None:
    moved = charts.spread([100.0, 101.0, 20.0], 30)
    assert moved[2] == 20.0
    assert moved[1] - moved[0] >= 30


@pytest.mark.parametrize("palette", [charts.HEAT_LIGHT, charts.HEAT_DARK])
def test_heat_map_numbers_are_readable(palette: tuple[str, ...]) -> None:
    assert all(charts.contrast(charts.ink(colour), colour) >= 4.5 for colour in palette)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([81.0, 93.0], (80, 100)), ([100.0], (90, 100)), ([0.0], (0, 10)), ([42.0, 44.0], (40, 50))],
)
def test_heat_domain(values: list[float], expected: tuple[float, float]) -> None:
    assert charts.heat_domain(values) == expected
