"""From an encoded picture or a camera's frame to the input of a student: decoder rule 1 against rule 2.

    python benchmarks/decode.py [--rounds N] [--side 224] [--resize 248] [--image PHOTO.jpg]

Each round times every case once by each rule, in an order drawn anew; ratios of rule 2 to rule 1 and their intervals
are those of rounds.py. The machine's ceiling is printed beside them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, __version__
from rounds import ceiling, machine, race, ratio, show

from cdl_edge.images import Preprocessing
from cdl_edge.measurement.profile import synthetic_jpeg

SIZES = {"0.3 MP JPEG": (640, 480), "2 MP JPEG": (1920, 1080), "12 MP JPEG": (4032, 3024)}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--resize", type=int, default=248)
    parser.add_argument("--image", type=Path, help="photograph to make the pictures of; without: synthetic")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    parser.add_argument("--ceiling-size", type=int, help="of the matrices that show the machine's ceiling")
    options = parser.parse_args()
    rules = {rule: Preprocessing(options.side, options.resize, decoder=rule) for rule in (1, 2)}
    sources = cases(options.image)
    calls = {(name, rule): lambda s=s, m=m: m.read(s) for name, s in sources.items() for rule, m in rules.items()}
    top = ceiling(size=options.ceiling_size)
    print(show(top))
    # Rule 1 of a case is the reference of one other: once a round each.
    times = race(calls, options.rounds, seed=options.seed, warm_up=1)
    rows: dict[str, Any] = {}
    print(f"{'':14}{'rule 1, ms':>12}{'rule 2, ms':>12}{'ratio':>8}   95 % interval     mean difference")
    for name, source in sources.items():
        old, new = times[name, 1], times[name, 2]
        found = ratio(new, old)
        apart = float(np.abs(rules[1].read(source).astype(int) - rules[2].read(source)).mean())
        rows[name] = {
            "rule_1_ms": {"median": float(np.median(old)), "min": float(old.min())},
            "rule_2_ms": {"median": float(np.median(new)), "min": float(new.min())},
            "ratio": found.median,
            "interval": [found.low, found.high],
            "mean_difference": apart,
        }
        print(
            f"{name:14}{np.median(old):12.2f}{np.median(new):12.2f}{found.median:8.3f}"
            f"   {found.low:.3f} .. {found.high:.3f}"
            f"{apart:14.2f} of 255"
        )
    document = {
        "rounds": options.rounds,
        "preprocessing": rules[2].to_json(),
        "cases": rows,
        "seed": options.seed,
        "machine": machine(),
        "ceiling": top,
        "pillow": __version__,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
