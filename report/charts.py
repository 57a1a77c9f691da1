"""What is drawn, as geometry and colours: axes, lines, bars and the steps of the heat map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .words import ms_text

# Sequential, one hue, darker (on a light page) or lighter (on a dark page) is more: readable with every kind of colour
# vision and in grey print. The text on each step is chosen by contrast in `ink`.
HEAT_LIGHT = ("#f1f6fb", "#deeaf6", "#c8dcf0", "#abcbe6", "#86b4da", "#5e9acb", "#2f75b0", "#1f5f99", "#134678")
HEAT_DARK = ("#17212c", "#1a2d3f", "#1d3a55", "#21496d", "#285a88", "#3670a5", "#568fc2", "#86b2da", "#bdd8ef")
INKS = ("#ffffff", "#0b1620")


def ink(colour: str) -> str:
    """The one of INKS with more contrast on `colour` (WCAG 2 contrast ratio)."""
    return max(INKS, key=lambda text: contrast(text, colour))


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def heat_domain(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the colour scale in %: the multiples of 10 around the values, at least 10 apart."""
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    return (float(low), float(high)) if high > low else (float(max(0, low - 10)), float(max(10, high)))


def heat_cell(value: float | None, low: float, high: float) -> dict[str, Any] | None:
    """Text and colour step of one accuracy in % between the ends of the scale; None for a task not learnt yet."""
    if value is None:
        return None
    step = min(len(HEAT_LIGHT) - 1, int((value - low) / (high - low) * len(HEAT_LIGHT)))
    return {"text": f"{value:.1f}" if value < 99.95 else "100", "step": step}


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-9)
    step = next(
        m * 10.0**e
        for e in itertools.count(math.floor(math.log10(span / most)))
        for m in (1, 2, 5)
        if span / (m * 10.0**e) <= most - 1
    )
    return [round(step * i, 10) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def line_chart(title: str, unit: str, series: Sequence[tuple[str, Sequence[float]]], zero: bool) -> dict[str, Any]:
    """Geometry of one value per task, in pixels of a fixed view box.

    Args:
        series: (name, values (T,)); all of one length.
        zero: the axis must include 0.
    """
    width, height, left, right, top, bottom = 480, 268, 44, 88, 24, 44
    flat = [v for _, values in series for v in values]
    low, high = min([*flat, 0.0]) if zero else min(flat), max(flat)
    # Nearly constant values must not look like a landslide.
    padding = max(0.0, 4.0 - (high - low)) / 2
    if not zero:
        low, high = max(0.0, low - padding), min(100.0, high + padding)
    marks = ticks(low, max(high, low + 2.0))
    tasks = len(series[0][1])

    def x(i: int) -> float:
        return round(left + (width - left - right) * i / (tasks - 1), 2)

    def y(value: float) -> float:
        return round(height - bottom - (height - top - bottom) * (value - marks[0]) / (marks[-1] - marks[0]), 2)

    lines: list[dict[str, Any]] = []
    for name, values in series:
        points = [
            {"x": x(i), "y": y(v), "title": f"{name.capitalize()}, after task {i + 1}: {v:.2f} {unit}"}
            for i, v in enumerate(values)
        ]
        path = "M" + " L".join(f"{p['x']} {p['y']}" for p in points)
        lines.append({"name": name, "points": points, "path": path, "last": f"{values[-1]:.1f}"})
    for line, label_y in zip(lines, spread([line["points"][-1]["y"] for line in lines], 30), strict=True):
        line["label_y"] = min(label_y, height - bottom - 4)
    every = math.ceil(tasks / 12)
    decimals = 0 if all(m == round(m) for m in marks) else 1
    return {
        "title": title,
        "unit": unit,
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "top": top,
        "floor": height - bottom,
        "y_ticks": [{"y": y(m), "text": f"{m:.{decimals}f}", "zero": m == 0 and marks[0] < 0} for m in marks],
        "x_ticks": [{"x": x(i), "text": str(i + 1)} for i in range(tasks) if i % every == 0],
        "lines": lines,
        "alt": f"{title} after each of {tasks} tasks, in {unit}. "
        + " ".join(f"{name.capitalize()}: from {v[0]:.1f} to {v[-1]:.1f}." for name, v in series),
    }


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move labels apart until neighbours are `gap` pixels from each other, in their order here."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for above, below in itertools.pairwise(order):
        missing = gap - (moved[below] - moved[above])
        if missing > 0:
            moved[above] -= missing / 2
            moved[below] += missing / 2
    return moved


def histogram(trace_ms: Sequence[float], most: int = 40) -> tuple[list[float], list[int], int]:
    """Counts over bins of a round width.

    Returns: (edges (B + 1,), counts (B,), overflow): counts plus overflow make len(trace_ms). Values far above p99 are
        the overflow: one hiccup of the operating system must not flatten everything else.
    """
    values = np.asarray(trace_ms, dtype=np.float64)
    low, p99, largest = float(values.min()), float(np.percentile(values, 99)), float(values.max())
    high = min(largest, p99 + 0.3 * (p99 - low))
    edges = ticks(low, max(high, low * 1.001 + 1e-6), most)
    # A value on the last edge belongs to the last bin, as in numpy.
    inside = values <= edges[-1]
    counts, _ = np.histogram(values[inside], bins=np.asarray(edges))
    return edges, [int(c) for c in counts], int((~inside).sum())


def histogram_chart(trace_ms: Sequence[float], end: Mapping[str, float]) -> dict[str, Any]:
    """Geometry of a histogram of milliseconds with p50, p90 and p99 (of `end`, else of the trace) marked."""
    width, height, left, right, top, bottom = 480, 288, 44, 20, 66, 44
    edges, counts, overflow = histogram(trace_ms)
    marks = [m for m in ticks(0, max(counts), 5) if m == round(m)]

    def x(value: float) -> float:
        return left + (width - left - right) * (value - edges[0]) / (edges[-1] - edges[0])

    def y(count: float) -> float:
        return height - bottom - (height - top - bottom) * count / marks[-1]

    bars = [
        {
            "x": round(x(a) + 0.5, 2),
            "y": round(y(count), 2),
            "width": round(max(0.5, x(b) - x(a) - 1), 2),
            "height": round(height - bottom - y(count), 2),
            "title": f"{a:g} to {b:g} ms: {count:,} call{'s' * (count != 1)}",
        }
        for a, b, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    lines = []
    for row, name in enumerate(("p50", "p90", "p99")):
        value = float(end.get(name, np.percentile(trace_ms, int(name[1:]))))
        at = round(min(max(x(value), left), width - right), 2)
        flip = at > width - right - 100
        lines.append({"name": name, "text": f"{ms_text(value)} ms", "x": at, "y": 16 + 17 * row, "flip": flip})
    most = 7
    while len(numbers := [m for m in ticks(edges[0], edges[-1], most) if edges[0] - 1e-9 <= m <= edges[-1] + 1e-9]) > 8:
        most -= 1
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "top": top,
        "floor": height - bottom,
        "bars": bars,
        "lines": lines,
        "x_ticks": [{"x": round(x(m), 2), "text": f"{m:g}"} for m in numbers],
        "y_ticks": [{"y": round(y(m), 2), "text": f"{m:,.0f}"} for m in marks],
        "overflow": f"{overflow:,} of {len(trace_ms):,} calls took longer than {edges[-1]:g} ms (at most "
        f"{ms_text(max(trace_ms))} ms) and are not drawn."
        if overflow
        else None,
        "n": f"{len(trace_ms):,}",
        "alt": f"Distribution of {len(trace_ms):,} end-to-end times in ms. "
        + ", ".join(f"{line['name']} {line['text']}" for line in lines),
    }
