"""Draws docs/results.svg from the first table of docs/results.md that has learners and distillers.

    python docs/make_chart.py

A test says when the file is stale.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

PAGE = Path(__file__).parent / "results.md"
TARGET = Path(__file__).parent / "results.svg"
SECTION = "## The pair of 2026-11-21"
"whose table of learners and distillers is drawn"
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([\d.]+) ± ([\d.]+) \|", re.MULTILINE)
COLOURS = ("#6b7280", "#2563a8", "#b45309", "#15803d", "#9d174d")
INK = "#1f2933"
LEFT, TOP, LINE, WIDTH = 110, 56, 18, 900
"margins and the height of a row, pixels"


def read() -> dict[str, dict[str, tuple[float, float]]]:
    """learner -> distiller -> (mean accuracy in %, deviation over seeds), in the order of the table."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for learner, distiller, mean, deviation in ROW.findall(PAGE.read_text("utf-8").partition(SECTION)[2]):
        if not learner.startswith(("all ", "pool ")) and len(found.get(learner, {})) < len(COLOURS):
            found.setdefault(learner, {})[distiller] = (float(mean), float(deviation))
    return found


def picture() -> str:
    """A dot for each row, with a line of one deviation to both sides. One group a learner, one colour a distiller."""
    table = read()
    names = list(next(iter(table.values())))
    values = [v for row in table.values() for v in row.values()]
    low, high = min(m - d for m, d in values) // 1, -(-max(m + d for m, d in values) // 1)
    scale = (WIDTH - LEFT - 30) / (high - low)
    height = TOP + sum(LINE * len(row) + 14 for row in table.values()) + 34

    def x(value: float) -> float:
        return LEFT + (value - low) * scale

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="DejaVu Sans, Verdana, '
        f'Arial, sans-serif" font-size="12" fill="{INK}" role="img" aria-label="Accuracy of learners and distillers">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    right = 14.0
    for name, colour in zip(names, COLOURS, strict=False):
        parts.append(f'<circle cx="{right:g}" cy="18" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{right + 10:g}" y="22">{escape(name)}</text>')
        right += 34 + 7.4 * len(name)
    for value in range(int(low), int(high) + 1):
        ends = f'x1="{x(value):.1f}" x2="{x(value):.1f}"'
        parts.append(f'<line {ends} y1="{TOP - 10}" y2="{height - 34}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{height - 18}" text-anchor="middle">{value} %</text>')
    y = float(TOP)
    for learner, row in table.items():
        middle = y + LINE * (len(row) - 1) / 2 + 4
        parts.append(f'<text x="14" y="{middle:.1f}" font-size="14" font-weight="bold">{escape(learner)}</text>')
        for name, (mean, deviation) in row.items():
            colour = COLOURS[names.index(name)]
            ends = f'x1="{x(mean - deviation):.1f}" x2="{x(mean + deviation):.1f}"'
            parts.append(f'<line {ends} y1="{y:g}" y2="{y:g}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{x(mean):.1f}" cy="{y:g}" r="5" fill="{colour}"/>')
            y += LINE
        y += 14
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture(), "utf-8")
