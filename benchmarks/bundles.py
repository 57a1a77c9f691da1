"""Time and size of bundles beside each other: what prompts, a KD token or a second pass cost on the device.

    python benchmarks/bundles.py BUNDLE BUNDLE... [--rounds 300]

The first one is the reference, as the frozen student without prompts: a round times it as often as all others together,
in an order drawn anew (rounds.py). One picture of its own self-test, fp32, ONNX Runtime, one thread, CPU time of the
process. A size is that of the files that the graph reads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rounds import ceiling, clock_of, machine, race, ratio, show, version_of

from cdl_edge.artefacts.external import external_records
from cdl_edge.runtime import load


def megabytes(graph: Path) -> float:
    """Of a graph and the files that its constants are in."""
    read = {graph, *(graph.parent / record.location for record in external_records(graph))}
    return sum(file.stat().st_size for file in read) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    parser.add_argument("--ceiling-size", type=int, help="of the matrices that show the machine's ceiling")
    options = parser.parse_args()
    names = [str(path) for path in options.bundles]
    if len(set(names)) < 2:
        parser.error("two different bundles or more")
    with ExitStack() as stack:
        runners = {n: stack.enter_context(load(n, "onnxruntime", 1, precision="fp32")) for n in dict.fromkeys(names)}
        top = ceiling(size=options.ceiling_size)
        print(show(top))
        calls = {n: partial(runner.infer, runner.bundle.selftest()[0][:1]) for n, runner in runners.items()}
        times = race(calls, options.rounds, names[0], options.seed, clock_of(1))
    rows: dict[str, Any] = {}
    for name, runner in runners.items():
        found = ratio(times[name], times[names[0]])
        rows[name] = {"ms": float(np.median(times[name])), "ratio": found._asdict(), "mb": megabytes(runner.path)}
        print(f"{name:40} {rows[name]['ms']:8.2f} ms   {found}   {rows[name]['mb']:6.1f} MB")
    about = {"rounds": options.rounds, "onnxruntime": version_of("onnxruntime", "onnxruntime-gpu")}
    print(json.dumps({"bundles": rows, **about, "machine": machine(), "ceiling": top}))


if __name__ == "__main__":
    main()
