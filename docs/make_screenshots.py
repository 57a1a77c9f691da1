"""Takes docs/report.png and docs/page.png of a run on `digits`: never of photographs, which belong to somebody.

pip install playwright                       # drives a Chromium that is installed
cdl-edge train --data digits --tasks 5 --out RUN && cdl-edge export RUN --out BUNDLE
cdl-edge report RUN BUNDLE --out report.html
python docs/make_screenshots.py report.html BUNDLE /usr/bin/chromium
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

DOCS = Path(__file__).parent
SIZE = {"width": 1000, "height": 900}
"of the window, pixels"


def digit(path: Path, index: int = 5) -> Path:
    """One scan of scikit-learn's digits, enlarged to 240 x 240."""
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[index] * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).resize((240, 240), Image.Resampling.BICUBIC).save(path)
    return path


def save(shot: bytes, name: str) -> None:
    """With 128 colours: small, and text stays sharp."""
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)
    print(f"{name}: {(DOCS / name).stat().st_size // 1000} kB")


def main(report: str, bundle: str, chromium: str) -> None:
    """report: HTML file; bundle: folder, served meanwhile; chromium: program."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(Path(report).resolve().as_uri())
        save(page.screenshot(), "report.png")
        command = [sys.executable, "-u", "-m", "cdl_edge.cli", "serve", bundle, "--port", "0", "--name", "digits"]
        command += ["--token-file", f"{folder}/token"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert server.stdout is not None
            address = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
            page.goto(address)
            for index in (7, 4, 9, 12, 5):
                page.set_input_files("#file", digit(Path(folder) / f"{index}.png", index))
                page.wait_for_timeout(1500)
            save(page.screenshot(), "page.png")
        finally:
            server.terminate()
            server.wait()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
