"""Made-up photographs of four kinds of fruit: what the first page shows was printed for these.

    python docs/make_photos.py photos

Every picture is drawn from its own number, so everybody gets the same ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = (160, 120)
COUNT = 20
"pictures of each fruit"
SKINS = {"apple": (196, 40, 38), "cherry": (140, 12, 40), "pear": (186, 190, 70), "plum": (84, 44, 110)}


def draw(fruit: str, seed: int) -> Image.Image:
    """One fruit at a random place, size and shade, on a random ground, with noise: (120, 160) pixels, RGB."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", SIZE, tuple(int(v) for v in rng.integers(110, 240, 3)))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, int(rng.integers(70, 110)), *SIZE), fill=tuple(int(v) for v in rng.integers(70, 200, 3)))
    x, y, r = rng.uniform(50, 110), rng.uniform(50, 75), rng.uniform(20, 34)
    skin = tuple(int(np.clip(v + rng.normal(0, 14), 0, 255)) for v in SKINS[fruit])
    brown = (90, 60, 30)

    def disc(cx: float, cy: float, rx: float, ry: float, fill: tuple[int, ...]) -> None:
        pen.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=fill)

    if fruit == "cherry":
        for side in (-1, 1):
            pen.line((x + side * r * 0.6, y, x, y - r * 1.4), fill=brown, width=2)
            disc(x + side * r * 0.6, y + 4, r * 0.5, r * 0.5, skin)
    else:
        pen.line((x, y - r * 0.8, x + r * 0.2, y - r * 1.3), fill=brown, width=3)
        disc(x, y, *((r * 0.75, r) if fruit == "plum" else (r, r * 0.92)), skin)
    if fruit == "pear":
        disc(x, y - r * 0.75, r * 0.6, r * 0.65, skin)
    disc(x - r * 0.35, y - r * 0.3, r * 0.12, r * 0.18, (250, 245, 235))
    noise = rng.normal(0, 9, (SIZE[1], SIZE[0], 3))
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), np.float64) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write(folder: Path, count: int = COUNT) -> None:
    """`count` pictures of each fruit: FOLDER/apple/IMG_0001.jpg and so on."""
    for c, fruit in enumerate(SKINS):
        (folder / fruit).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            number = 100 * c + i + 1
            draw(fruit, number).save(folder / fruit / f"IMG_{number:04d}.jpg", quality=90)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
