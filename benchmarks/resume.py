"""A run killed with SIGKILL at random moments and resumed, against the same run left alone.

    python benchmarks/resume.py --data folder:PATH --out OUT [--kills 5] [any further options of `cdl-edge train`]

Prints where each kill struck; the last line of stdout is JSON with whether the accuracy matrices are identical.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path


def command(data: str, out: Path, options: list[str]) -> list[str]:
    """`cdl-edge train` with one thread."""
    base = [sys.executable, "-m", "cdl_edge.cli", "train", "--data", data, "--out", str(out), "--threads", "1"]
    return [*base, "--resume", *options]


def main() -> None:
    """Parse, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments, options = parser.parse_known_args()
    rng = random.Random(arguments.seed)
    whole, broken = arguments.out / "whole", arguments.out / "broken"
    begun = time.perf_counter()
    subprocess.run(command(arguments.data, whole, options), check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begun
    kills = 0
    while kills < arguments.kills:
        process = subprocess.Popen(command(arguments.data, broken, options), stdout=subprocess.DEVNULL)
        try:
            # Starting takes some seconds of each attempt, so that five of these reach into the middle of a short run.
            process.wait(timeout=rng.uniform(0.17, 0.27) * seconds)
            break  # finished before all kills struck: reported below
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            print(f"kill {kills}: exit {process.returncode}")
    subprocess.run(command(arguments.data, broken, options), check=True, stdout=subprocess.DEVNULL)
    sides = [json.loads((p / "metrics.json").read_text()) for p in (whole, broken)]
    matrices = [{s: m[s]["matrix"] if m[s] else None for s in ("teacher", "student")} for m in sides]
    losses = [{s: m[s]["loss"] if m[s] else None for s in ("teacher", "student")} for m in sides]
    result = {
        "kills": kills,
        "identical_matrices": matrices[0] == matrices[1],
        "identical_losses": losses[0] == losses[1],
    }
    print(json.dumps({**result, "matrix": matrices[0]["student"]}))


if __name__ == "__main__":
    main()
