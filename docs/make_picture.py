"""Draws docs/way.svg, the picture of the first page: from photographs to answers on a device.

    python docs/make_picture.py

A test says when the file is stale.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

TARGET = Path(__file__).parent / "way.svg"
WIDTH, HEIGHT = 960, 320
BLUE, GREEN, GREY, INK = "#dbe8f8", "#dcf0dd", "#f1f1ee", "#1f2933"
FOLDERS = (  # (x, y, width, title, lines below it, colour)
    (20, 66, 140, "photographs", ("a folder", "for each class"), GREY),
    (270, 66, 140, "RUN", ("student, statistics,", "accuracy, report"), BLUE),
    (550, 66, 140, "BUNDLE", ("static ONNX graphs,", "weights, hashes"), BLUE),
    (800, 66, 140, "answers", ("class, confidence,", "or “unknown”"), GREEN),
)
COMMANDS = (  # (from x, to x, command, what it does)
    (160, 270, "train", "teacher → student"),
    (410, 550, "export", "proven equal"),
    (690, 800, "predict", "no torch"),
)
BOX = 76
"height of a folder, pixels"


def text(x: float, y: float, words: str, size: int = 13, weight: str = "normal", anchor: str = "middle") -> str:
    """One line of text around, or from, (x, y)."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points that ends in a head."""
    path = " L".join(f"{x:g},{y:g}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{INK}" stroke-width="1.6" marker-end="url(#head)"/>'


def box(x: float, y: float, width: float, height: float, fill: str, dashed: bool = False) -> str:
    """A rounded rectangle."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {size} rx="9" fill="{fill}" stroke="{INK}"{dash}/>'


def picture() -> str:
    """The whole SVG."""
    bottom = 66 + BOX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="DejaVu Sans, Verdana, '
        f'Arial, sans-serif" fill="{INK}" role="img" aria-label="From photographs to answers on a device">',
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        f'<path d="M0,0 L9,4 L0,8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="white"/>',
        box(8, 10, 512, 300, "none", dashed=True),
        text(20, 32, "where you train: torch, on a CPU or a GPU", 12, anchor="start"),
        box(534, 10, 418, 300, "none", dashed=True),
        text(546, 32, "on the device: numpy, Pillow, ONNX Runtime", 12, anchor="start"),
    ]
    for x, y, width, title, lines, fill in FOLDERS:
        parts += [box(x, y, width, BOX, fill), text(x + width / 2, y + 24, title, 15, "bold")]
        parts += [text(x + width / 2, y + 43 + 16 * i, line, 12) for i, line in enumerate(lines)]
    for start, end, command, meaning in COMMANDS:
        middle = (start + end) / 2
        parts += [arrow((start, 100), (end, 100)), text(middle, 90, command, 14, "bold")]
        parts.append(text(middle, 118, meaning, 11))
    parts += [
        # New classes: the same run goes on, and only what has changed travels.
        box(20, 214, 140, 56, GREY),
        text(90, 238, "new classes", 14, "bold"),
        text(90, 257, "later, any number", 12),
        arrow((160, 242), (310, 242), (310, bottom)),
        text(236, 232, "train --extend", 14, "bold"),
        text(236, 260, "no old training pictures", 11),
        arrow((380, bottom), (380, 190), (570, 190), (570, bottom)),
        text(450, 182, "pack create", 14, "bold"),
        text(450, 208, "signed, kilobytes", 11),
        text(576, 182, "pack install", 14, "bold", "start"),
        # The server.
        arrow((681, bottom), (681, 242), (800, 242)),
        text(741, 232, "serve", 14, "bold"),
        box(800, 214, 140, 56, GREEN),
        text(870, 238, "HTTP server", 14, "bold"),
        text(870, 257, "and a page", 12),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture(), "utf-8")
