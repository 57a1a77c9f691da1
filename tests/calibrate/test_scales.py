"""From a histogram to a range."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.calibrate.scales import METHODS, choose_range
from cdl_edge.errors import InputError
from cdl_edge.ranges import BINS, Histogram

RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.standard_normal(20_000),
    "outliers": np.append(RNG.standard_normal(20_000), [90.0, -70.0]),
    "gelu": np.maximum(RNG.standard_normal(20_000) * 2, -0.17),
    "positive": RNG.random(5_000) + 3,
    "negative": -RNG.random(5_000) - 3,
    "zeros": np.zeros(10),
    "one": np.full(5, 2.5),
}
DATA = {name: values.astype(np.float32) for name, values in DATA.items()}


def rounded(values, low, high, symmetric):
    """What 8 bits make of values, as QuantizeLinear and DequantizeLinear do it."""
    if symmetric:
        scale = high / 127
        return np.clip(np.rint(values / scale), -127, 127) * scale
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale


def error(values, method, symmetric):
    low, high = choose_range(Histogram.of(values), method, symmetric)
    values = values.astype(np.float64)
    return float(((values - rounded(values, low, high, symmetric)) ** 2).mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DATA)
def test_zero_is_inside_and_nothing_is_wider_than_what_was_seen(name, method, symmetric):
    values = DATA[name]
    low, high = choose_range(Histogram.of(values), method, symmetric)
    assert low <= 0 <= high
    if symmetric:
        assert low == -high and high <= np.abs(values).max()
    else:
        assert low >= min(values.min(), 0) and high <= max(values.max(), 0)
    if values.any():
        assert high > low


@pytest.mark.parametrize("name", DATA)
def test_max_covers_everything_exactly(name):
    values = DATA[name]
    ends = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    assert choose_range(Histogram.of(values), "max", False) == ends
    assert choose_range(Histogram.of(values), "max", True) == (-max(-ends[0], ends[1]), max(-ends[0], ends[1]))


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_one_sign_has_one_end(method):
    low, high = choose_range(Histogram.of(DATA["positive"]), method, False)
    assert low == 0 and high > 3
    low, high = choose_range(Histogram.of(DATA["negative"]), method, False)
    assert low < -3 and high == 0


def test_percentile_drops_the_tail():
    values = DATA["outliers"]  # 2 of 20,002: one value in 10,000 on each side is 2
    low, high = choose_range(Histogram.of(values), "percentile", False)
    assert 3 < high < 5 and -5 < low < -3
    low, high = choose_range(Histogram.of(values), "percentile", True)
    assert 3 < high < 5 and low == -high


def test_percentile_of_a_histogram_made_by_hand():
    """20,000 values in bins of width 1: all but one are below 512."""
    counts = np.zeros(BINS, np.int64)
    counts[:512] = 20_000 // 512
    counts[511] += 20_000 - counts.sum() - 1
    counts[1023] = 1
    histogram = Histogram(0.0, 1023.5, counts)
    assert histogram.width == 1 and histogram.values == 20_000
    assert choose_range(histogram, "percentile", False) == (0.0, pytest.approx(512, abs=1.01))
    assert choose_range(histogram, "max", False) == (0.0, 1023.5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_beats_max_where_there_are_outliers(symmetric):
    values = np.append(RNG.standard_normal(200_000), [30.0, -25.0]).astype(np.float32)
    best, plain = error(values, "mse", symmetric), error(values, "max", symmetric)
    assert best < 0.75 * plain
    # And no share of the range that it might have taken is better by more than what binning hides.
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    tried = [((values - rounded(values, low * s, high * s, symmetric)) ** 2).mean() for s in np.linspace(0.3, 1, 15)]
    assert best <= min(tried) * 1.05


def test_mse_keeps_the_whole_range_of_a_uniform_tensor():
    values = RNG.random(50_000).astype(np.float32)
    _, high = choose_range(Histogram.of(values), "mse", False)
    assert high > 0.95 * values.max()


def test_mse_searches_both_ends_apart():
    """A tail on one side only: the other end stays."""
    values = np.append(RNG.uniform(-1, 1, 100_000), RNG.uniform(1, 12, 4)).astype(np.float32)
    low, high = choose_range(Histogram.of(values), "mse", False)
    assert low == pytest.approx(-1, abs=0.08) and high < 0.9 * values.max()


def test_entropy_cuts_a_long_thin_tail_and_no_bulk():
    values = np.append(RNG.standard_normal(200_000), RNG.uniform(10, 40, 20)).astype(np.float32)
    for symmetric in (False, True):
        _, high = choose_range(Histogram.of(values), "entropy", symmetric)
        assert 3 < high < 30
    _, high = choose_range(Histogram.of(DATA["normal"]), "entropy", True)
    assert high > 0.7 * np.abs(DATA["normal"]).max()


def test_an_unknown_method():
    with pytest.raises(InputError, match="did you mean 'percentile'"):
        choose_range(Histogram.of(DATA["normal"]), "percentil", False)
