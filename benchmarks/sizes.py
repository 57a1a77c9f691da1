"""Accuracy against latency of one backbone over image sizes: what an edge user tunes first.

    python benchmarks/sizes.py --data folder:PATH/novel --student builtin:student --sizes 64,96,128 --out sizes

For each size: train, export, time the bundle (batch 1, one thread). Times are taken in turns, so that what else the
machine does meets every size. Finished sizes are not trained again. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cdl_edge import export, train
from cdl_edge.errors import InputError
from cdl_edge.runtime import load, open_bundle

CALLS, WARMUP = 20, 5


def made(size: int, out: Path, options: dict[str, Any], profile: str) -> dict[str, Any]:
    """Train and export at one size, or what of it is missing."""
    run, bundle = out / f"run-{size}", out / f"bundle-{size}"
    if not (run / "metrics.json").is_file():
        train(resume=(run / "config.json").is_file(), out=str(run), image_size=size, **options)
    if not (bundle / "manifest.json").is_file():
        export(run, bundle, profile=profile)
    manifest = open_bundle(bundle).manifest.document
    accuracy = manifest["accuracy"]
    return {
        "size": size,
        "bundle": str(bundle),
        "average_accuracy": accuracy["average_accuracy"],
        "forgetting": accuracy["forgetting"],
        "parity_max": manifest["parity"]["max_abs_error"],
        "backbone": manifest["backbone"]["source"],
    }


def timed(rows: list[dict[str, Any]], rounds: int, backend: str) -> None:
    """Put "compute_ms" (median) and its 10th and 90th percentile into the rows."""
    samples: dict[int, list[float]] = {row["size"]: [] for row in rows}
    for round_ in range(rounds):
        for row in rows:
            size = row["size"]
            with load(row["bundle"], backend, threads=1, verify=round_ == 0) as runner:
                pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
                name = runner.signature.images
                for call in range(WARMUP + CALLS):
                    start = _cpu_ms()
                    runner.compute({name: pixels})
                    if call >= WARMUP:
                        samples[size].append(_cpu_ms() - start)
    for row in rows:
        found = samples[row["size"]]
        cuts = statistics.quantiles(found, n=10)
        row["compute_ms"] = {"p50": statistics.median(found), "p10": cuts[0], "p90": cuts[-1], "n": len(found)}


def _cpu_ms() -> float:
    """CPU time of this process: other work on the machine does not count."""
    return time.process_time() * 1000


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="image source, as of train")
    parser.add_argument("--sizes", default="64,96,128,160,192,224", help="pixels, with commas")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and bundles")
    parser.add_argument("--config", type=Path, help="JSON of further options of train")
    for name in ("teacher", "student", "student-arch", "teacher-arch", "learner", "distill", "query"):
        parser.add_argument(f"--{name}", help="as of train")
    for name in ("teacher-image-size", "tasks", "epochs", "seed", "limit-per-class"):
        parser.add_argument(f"--{name}", type=int, help="as of train")
    parser.add_argument("--profile", default="ort")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--rounds", type=int, default=5)
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    ours = {k: given.pop(k, None) for k in ("sizes", "out", "config", "profile", "backend", "rounds")}
    options = {**(json.loads(ours["config"].read_text()) if ours["config"] else {}), **given}
    rows = []
    try:
        for size in (int(s) for s in ours["sizes"].split(",")):
            rows.append(made(size, ours["out"], options, ours["profile"]))
    except InputError as error:
        sys.exit(f"error: {error}")
    timed(rows, ours["rounds"], ours["backend"])
    print("| pixels | average accuracy % | forgetting | CPU ms (p10 to p90) |\n|---|---|---|---|")
    for row in rows:
        ms = row["compute_ms"]
        numbers = f"{row['average_accuracy']:.2f} | {row['forgetting']:.2f}"
        print(f"| {row['size']} | {numbers} | {ms['p50']:.2f} ({ms['p10']:.2f} to {ms['p90']:.2f}) |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
