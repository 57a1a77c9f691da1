"""How long one image takes in each precision that runs here, measured in turns."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import Any

from ..errors import InputError
from ..runtime import load
from ..runtime.bundle import Bundle

CANDIDATES = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
"backend and precision; fp16 is for GPUs"
CALLS = 40
"of each; the first three are not counted"


def race(bundle: Bundle, threads: int | None = 1) -> list[dict[str, Any]]:
    """[{"backend", "precision", "compute_ms" (median), "ratio" (to the first)}] of one image, one call of each in turn.

    What cannot run here is left out: another processor, no OpenVINO, no graph of that precision.
    """
    with ExitStack() as stack:
        runners = {}
        for backend, precision in CANDIDATES:
            try:
                runners[backend, precision] = stack.enter_context(load(bundle, backend, threads, precision=precision))
            except InputError:
                continue
        images = bundle.selftest()[0][:1]
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
        for turn in range(CALLS + 3):
            for key, runner in runners.items():
                begin = time.perf_counter()
                runner.run(images)
                if turn >= 3:
                    times[key].append((time.perf_counter() - begin) * 1e3)
    first = next(iter(times.values()))
    return [
        {
            "backend": backend,
            "precision": precision,
            "compute_ms": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, first, strict=True)),
        }
        for (backend, precision), values in times.items()
    ]
