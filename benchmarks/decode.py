"""From an encoded picture or a camera's frame to the input of a student: decoder rule 1 against rule 2.

    python benchmarks/decode.py [--rounds N] [--side 224] [--resize 248] [--image PHOTO.jpg]

Each round times every case once by each rule, in an order drawn anew. The ratio of a case is the median of rule 2 over
the median of rule 1; its interval (95 %) comes from drawing rounds again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, __version__

from cdl_edge.images import Preprocessing
from cdl_edge.runtime.machine import cpu_model
from cdl_edge.runtime.profile import synthetic_jpeg

SIZES = {"0.3 MP JPEG": (640, 480), "2 MP JPEG": (1920, 1080), "12 MP JPEG": (4032, 3024)}
DRAWS = 2000
"resamples behind an interval"


def cases(photo: Path | None) -> dict[str, bytes | np.ndarray]:
    """Encoded pictures and a frame, by name."""
    made: dict[str, bytes | np.ndarray] = {}
    for name, size in SIZES.items():
        if photo is None:
            made[name] = synthetic_jpeg(*size)
            continue
        stream = io.BytesIO()
        Image.open(photo).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        made[name] = stream.getvalue()
    made["1080p frame"] = np.asarray(Image.open(io.BytesIO(bytes(made["2 MP JPEG"]))).convert("RGB"))
    return made


def measure(calls: dict[tuple[str, int], Callable[[], Any]], rounds: int) -> dict[tuple[str, int], np.ndarray]:
    """Milliseconds (rounds,) of each call, after one that is not counted."""
    rng = np.random.default_rng()
    keys = list(calls)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in keys}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for at in rng.permutation(len(keys)):
            start = time.perf_counter()
            calls[keys[at]]()
            times[keys[at]].append((time.perf_counter() - start) * 1e3)
    return {key: np.asarray(values) for key, values in times.items()}


def ratio(new: np.ndarray, old: np.ndarray) -> list[float]:
    """[ratio of the medians, lower, upper end of its 95 % interval]; rounds are drawn in pairs."""
    drawn = np.random.default_rng(0).integers(0, len(new), (DRAWS, len(new)))
    ratios = np.median(new[drawn], axis=1) / np.median(old[drawn], axis=1)
    return [float(v) for v in (np.median(new) / np.median(old), *np.percentile(ratios, [2.5, 97.5]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--resize", type=int, default=248)
    parser.add_argument("--image", type=Path, help="photograph to make the pictures of; without: synthetic")
    options = parser.parse_args()
    rules = {rule: Preprocessing(options.side, options.resize, decoder=rule) for rule in (1, 2)}
    sources = cases(options.image)
    calls = {(name, rule): lambda s=s, m=m: m.read(s) for name, s in sources.items() for rule, m in rules.items()}
    times = measure(calls, options.rounds)
    rows: dict[str, Any] = {}
    print(f"{'':14}{'rule 1, ms':>12}{'rule 2, ms':>12}{'ratio':>8}   95 % interval     mean difference")
    for name, source in sources.items():
        old, new = times[name, 1], times[name, 2]
        found = ratio(new, old)
        apart = float(np.abs(rules[1].read(source).astype(int) - rules[2].read(source)).mean())
        rows[name] = {
            "rule_1_ms": {"median": float(np.median(old)), "min": float(old.min())},
            "rule_2_ms": {"median": float(np.median(new)), "min": float(new.min())},
            "ratio": found[0],
            "interval": found[1:],
            "mean_difference": apart,
        }
        print(
            f"{name:14}{np.median(old):12.2f}{np.median(new):12.2f}{found[0]:8.3f}   {found[1]:.3f} .. {found[2]:.3f}"
            f"{apart:14.2f} of 255"
        )
    document = {
        "rounds": options.rounds,
        "preprocessing": rules[2].to_json(),
        "cases": rows,
        "cpu": cpu_model(),
        "machine": platform.platform(),
        "pillow": __version__,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
