"""From a histogram to the range that 8 bits are spread over."""

from __future__ import annotations

import numpy as np

from ..errors import choose
from ..ranges import Histogram

METHODS = {
    "max": "everything that was seen",
    "percentile": "all but 0.01 % of the values",
    "entropy": "the range whose rounded distribution tells least apart from the true one (KL divergence)",
    "mse": "the range with the smallest mean squared rounding and clipping error",
}
PERCENTILE = 0.9999
SHARES = np.linspace(0.3, 1.0, 36)
"of the full range on each side: what `mse` and `entropy` try"


def choose_range(histogram: Histogram, method: str, symmetric: bool) -> tuple[float, float]:
    """(low, high) with low <= 0 <= high; symmetric: low = -high. Raises: InputError for an unknown method."""
    choose("calibration method", method, METHODS)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if method == "percentile":
        low = min(histogram.percentile(1 - PERCENTILE), 0.0)
        high = max(histogram.percentile(PERCENTILE), 0.0)
    elif method in ("mse", "entropy"):
        return _search(histogram, _squared_error if method == "mse" else _divergence, symmetric)
    if symmetric:
        high = max(-low, high)
        low = -high
    return low, high


def _search(histogram: Histogram, error: object, symmetric: bool) -> tuple[float, float]:
    assert callable(error)
    filled = np.flatnonzero(histogram.counts)
    centres = np.clip((histogram.first + filled + 0.5) * histogram.width, histogram.low, histogram.high)
    counts = histogram.counts[filled].astype(np.float64)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if symmetric:
        end = max(-low, high)
        candidates = [(-end * s, end * s) for s in SHARES]
    else:
        # A one-sided tensor (GELU's output all but) has one end to search.
        lows = SHARES if low < 0 else SHARES[-1:]
        highs = SHARES if high > 0 else SHARES[-1:]
        candidates = [(low * a, high * b) for a in lows for b in highs]
    steps = 254 if symmetric else 255
    return min(candidates, key=lambda c: error(centres, counts, c[0], c[1], steps))


def _rounded(x: np.ndarray, low: float, high: float, steps: int) -> np.ndarray:
    scale = max(high - low, 1e-12) / steps
    zero = np.rint(low / scale)
    rounded: np.ndarray = (np.clip(np.rint(x / scale), zero, zero + steps)) * scale
    return rounded


def _squared_error(x: np.ndarray, counts: np.ndarray, low: float, high: float, steps: int) -> float:
    """sum c (x - q(x))^2; what is inside of a bin is spread evenly and rounds alike for all candidates."""
    return float((counts * (x - _rounded(x, low, high, steps)) ** 2).sum())


def _divergence(x: np.ndarray, counts: np.ndarray, low: float, high: float, steps: int) -> float:
    """KL(P || Q): P is clipped, Q gives each bin the mean of its level (as TensorRT's entropy calibrator does)."""
    inside = np.clip(x, low, high)
    level = np.rint((inside - low) / (max(high - low, 1e-12) / steps)).astype(np.int64)
    # What is clipped counts in P as if it stood at the end, and is missing where Q is made.
    kept = counts * ((x >= low) & (x <= high))
    mass, bins = np.bincount(level, kept, steps + 1), np.bincount(level, (counts > 0) * 1.0, steps + 1)
    q = (mass / np.maximum(bins, 1))[level]
    p = counts.copy()
    p, q = p / p.sum(), (q + 1e-9) / (q + 1e-9).sum()
    return float((p * np.log(p / q)).sum())
