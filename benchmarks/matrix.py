"""Every learner with every distiller on one image folder, one `cdl-edge train` a cell, two cells at a time.

    python benchmarks/matrix.py --data folder:PATH --out OUT [--seeds 0,1,2] [--epochs 5] [--limit-per-class 100]

A cell that is finished is not run again, a stopped one is resumed. Prints a Markdown table; the last line of stdout is
JSON. The seed draws the class order as well as the initial values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LEARNERS = ("l2p", "dualprompt", "coda", "apt")
DISTILLERS = ("none", "kd", "kdp")


def run_cell(arguments: argparse.Namespace, learner: str, distiller: str, seed: int) -> dict[str, object]:
    """Train one cell in a process of its own; returns its metrics.json."""
    out = Path(arguments.out) / f"{learner}-{distiller}-{seed}"
    if not (out / "metrics.json").exists():
        options = {
            "--data": arguments.data, "--out": out, "--learner": learner, "--distill": distiller, "--seed": seed,
            "--tasks": arguments.tasks, "--epochs": arguments.epochs, "--limit-per-class": arguments.limit_per_class,
            "--augment": arguments.augment, "--batch-size": arguments.batch_size, "--threads": 1,
        }  # fmt: skip
        command = [sys.executable, "-m", "cdl_edge.cli", "train", "--resume"]
        command += [str(part) for pair in options.items() for part in pair]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    metrics: dict[str, object] = json.loads((out / "metrics.json").read_text())
    return metrics


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit-per-class", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--augment", default="none")
    parser.add_argument("--parallel", type=int, default=2)
    arguments = parser.parse_args()
    seeds = [int(s) for s in arguments.seeds.split(",")]
    cells = [(learner, distiller, s) for s in seeds for learner in LEARNERS for distiller in DISTILLERS]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        results = dict(zip(cells, pool.map(lambda c: run_cell(arguments, *c), cells), strict=True))

    def figure(learner: str, distiller: str, side: str, key: str) -> str:
        values = [results[learner, distiller, s][side][key] for s in seeds if results[learner, distiller, s][side]]  # type: ignore[index]
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    print("| learner | distiller | student accuracy % | student forgetting | teacher accuracy % | seconds |")
    print("|---|---|---|---|---|---|")
    for learner in LEARNERS:
        for distiller in DISTILLERS:
            seconds = statistics.mean(float(results[learner, distiller, s]["seconds"]) for s in seeds)  # type: ignore[arg-type]
            columns = [("student", "average_accuracy"), ("student", "forgetting"), ("teacher", "average_accuracy")]
            cells_text = " | ".join(figure(learner, distiller, side, key) for side, key in columns)
            print(f"| {learner} | {distiller} | {cells_text} | {seconds:.0f} |")
    keep = ("average_accuracy", "forgetting", "incremental_accuracy")
    document = [
        {"learner": c[0], "distiller": c[1], "seed": c[2], "seconds": m["seconds"],
         **{side: {k: m[side][k] for k in keep} if m[side] else None for side in ("student", "teacher")}}  # type: ignore[index]
        for c, m in results.items()
    ]  # fmt: skip
    print(json.dumps({"cells": document, "arguments": vars(arguments)}))


if __name__ == "__main__":
    main()
