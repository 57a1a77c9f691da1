"""Eight bits without any image: from ranges that were kept while each task was learnt.

    python examples/int8.py bundles/fruit bundles/fruit-int8

One sees, for fp32 and int8 on this machine: ms for one image, bytes of the frozen weights, and how far the logits of
the self-test's images lie from the trained student's. Where int8 is slower the bundle recommends fp32.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import cdl_edge.runtime as runtime
from cdl_edge import calibrate


def main(bundle: str, out: str, runs: str = "50") -> dict[str, float]:
    """Returns: precision -> largest difference of the self-test's logits, as a share of their range."""
    result = calibrate(bundle, out, ranges="kept")
    print("recommended:", result["recommended"])
    off = {}
    for precision in ("fp32", "int8"):
        with runtime.load(out, "onnxruntime", threads=1, precision=precision) as student:
            images, expected = student.bundle.selftest()
            off[precision] = float(np.abs(student.infer(images) - expected).max() / np.ptp(expected))
            begin = time.perf_counter()
            for _ in range(int(runs)):
                student.infer(images[:1])
            milliseconds = 1e3 * (time.perf_counter() - begin) / int(runs)
            weights = result["bytes"]["backbone.int8.bin" if precision == "int8" else "backbone.bin"]
        print(f"{precision}: {milliseconds:.2f} ms, {weights / 1e6:.1f} MB, logits off by {100 * off[precision]:.3f} %")
    return off


if __name__ == "__main__":
    main(*sys.argv[1:])
