"""Latency of a bundle on this machine: what is timed, how steady it was, and under which conditions."""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__
from ..errors import InputError
from ..files import write_json
from . import load
from .bundle import Bundle, open_bundle
from .machine import board, cpu_model, governor, peak_rss_bytes, temperature_c, version_of
from .predict import probabilities
from .runner import Runner
from .select import selected

UNSTABLE_CV = 0.025
"coefficient of variation of the end-to-end time above which a result is flagged `unstable` (design/EDGE.md, 5)"
JITTER_RATIO = 1.5
"p99 / p50 of the end-to-end time above which it is flagged `jitter` (design/EDGE.md, 5)"
DEFINITIONS = {
    "preprocess_ms": "an encoded picture in memory to the graph's uint8 input: decode, scale, cut",
    "compute_ms": "one call of the backend on one picture",
    "end_to_end_ms": "an encoded picture in memory to label, probability and prompts: preprocess, compute, softmax",
    "load_ms": "create the session; check_ms: read the manifest and hash every file before it",
    "first_inference_ms": "the first call of the backend, not among the others",
    "std": "population standard deviation; cv = std / mean, a fraction",
    "flags": f"of end_to_end_ms: unstable: cv > {UNSTABLE_CV}; jitter: p99 / p50 > {JITTER_RATIO}",
}


def profile(
    bundle: Bundle | Path | str,
    backend: str = "auto",
    threads: int | None = None,
    runs: int = 200,
    images: Sequence[Path | str | bytes] | None = None,
    warmup: int = 20,
    trace: Path | str | None = None,
    precision: str | None = None,
) -> dict[str, Any]:
    """Load a bundle and time it, one picture a call, as a camera would.

    Args:
        backend, threads, precision: see `cdl_edge.runtime.load`.
        runs: timed calls; below 100 the p99 is the slowest call.
        images: encoded pictures (files are read before the clock starts), used in turn; None takes `synthetic_jpeg`.
        warmup: calls after the first one that are not counted.
        trace: where to write every sample as JSON {"end_to_end_ms": [...], "preprocess_ms": ..., "compute_ms": ...}.

    Returns: {"end_to_end_ms", "preprocess_ms", "compute_ms" (see `statistics`), "load_ms", "first_inference_ms",
        "backend", "flags", "context", "definitions", "trace_ms": every end-to-end time in order}.

    Raises: InputError for runs < 1, warmup < 0, no image, an unreadable one, and what `load` raises.
    """
    if runs < 1 or warmup < 0:
        raise InputError(
            "the number of runs is wrong", got=f"runs {runs}, warmup {warmup}", expected="runs >= 1, warmup >= 0"
        )
    begin = time.perf_counter()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    check_ms = None if isinstance(bundle, Bundle) else (time.perf_counter() - begin) * 1e3
    encoded, described = _encoded(opened, images)

    with load(opened, backend, threads, precision=precision) as runner:
        first = opened.preprocessing.read(encoded[0])[None]
        begin = time.perf_counter()
        runner.run(first)
        first_inference_ms = (time.perf_counter() - begin) * 1e3
        for i in range(warmup):
            _timed(runner, encoded[i % len(encoded)])
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        samples = np.array([_timed(runner, encoded[i % len(encoded)]) for i in range(runs)])  # (runs, 3)
        resolved = runner.describe()
        load_ms, key = runner.load_ms, runner.key

    stages = dict(zip(("preprocess_ms", "compute_ms", "end_to_end_ms"), samples.T, strict=True))
    if trace is not None:
        write_json(Path(trace), {name: values.tolist() for name, values in stages.items()})
    table = {name: statistics(values) for name, values in stages.items()}
    graph = str(opened.manifest["graphs"][key])
    return {
        "end_to_end_ms": table["end_to_end_ms"],
        "preprocess_ms": table["preprocess_ms"],
        "compute_ms": table["compute_ms"],
        "load_ms": load_ms,
        "first_inference_ms": first_inference_ms,
        "backend": resolved["backend"],
        "flags": flags(table["end_to_end_ms"]),
        "context": {
            "bundle": opened.name,
            "precision": resolved["precision"],
            "batch": 1,
            "runs": runs,
            "warmup": warmup,
            "images": described,
            "check_ms": check_ms,
            "providers": resolved["providers"],
            "threads": resolved["threads"],
            "versions": {
                "cdl-edge": __version__,
                resolved["backend"]: resolved["version"],
                "python": platform.python_version(),
                "numpy": np.__version__,
                "pillow": version_of("pillow"),
            },
            "cpu": cpu_model(),
            "cpu_count": os.cpu_count(),
            "board": board(),
            "os": platform.platform(),
            "governor": governor(),
            "temperature_c": temperature_c(),
            "load_average": busy,
            "peak_rss_bytes": peak_rss_bytes(),
            "files_bytes": {name: entry["bytes"] for name, entry in opened.manifest["files"].items()},
            "graph_sha256": opened.manifest["files"][graph]["sha256"],
        },
        "definitions": DEFINITIONS,
        "trace_ms": [round(float(v), 4) for v in stages["end_to_end_ms"]],
    }


def statistics(samples_ms: np.ndarray) -> dict[str, float | int]:
    """{"n", "min", "mean", "std", "cv", "p50", "p90", "p95", "p99", "max"} of float (n,) milliseconds.

    std is the population's; percentiles are interpolated linearly (numpy's default); cv is a fraction.
    """
    mean, std = float(np.mean(samples_ms)), float(np.std(samples_ms))
    p50, p90, p95, p99 = (float(v) for v in np.percentile(samples_ms, [50, 90, 95, 99]))
    return {
        "n": len(samples_ms),
        "min": float(np.min(samples_ms)),
        "mean": mean,
        "std": std,
        "cv": std / mean if mean else 0.0,
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "max": float(np.max(samples_ms)),
    }


def flags(stage: dict[str, float | int]) -> list[str]:
    """What makes the numbers of a stage doubtful: "unstable", "jitter"."""
    found = []
    if stage["cv"] > UNSTABLE_CV:
        found.append("unstable")
    if stage["p99"] > JITTER_RATIO * stage["p50"]:
        found.append("jitter")
    return found


@cache
def synthetic_jpeg(width: int = 640, height: int = 480) -> bytes:
    """A fixed JPEG of a camera's typical size, smooth shapes with some grain: the same bytes for one Pillow version."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    waves = np.stack([np.sin(x / 37 + y / 91), np.sin(x / 53 - y / 29), np.cos((x + y) / 71)], axis=2)
    stream = io.BytesIO()
    Image.fromarray(np.clip(waves * 90 + 128 + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _encoded(bundle: Bundle, images: Sequence[Path | str | bytes] | None) -> tuple[list[bytes], str]:
    """The pictures' bytes, each decoded once to be sure, and a line that says what they are."""
    if images is None:
        return [synthetic_jpeg()], "synthetic JPEG, 640 x 480 (no image was given)"
    if not images:
        raise InputError("no image to time", fix="name at least one, or none at all for a synthetic one")
    for image in images:
        bundle.preprocessing.read(image)  # an unreadable file is named here
    return [
        i if isinstance(i, bytes) else Path(i).read_bytes() for i in images
    ], f"{len(images)} given image(s), in turn"


def _timed(runner: Runner, encoded: bytes) -> tuple[float, float, float]:
    """One picture: milliseconds of preprocess, compute, end to end."""
    bundle = runner.bundle
    start = time.perf_counter()
    pixels = bundle.preprocessing.read(encoded)[None]
    ready = time.perf_counter()
    outputs = runner.run(pixels)
    computed = time.perf_counter()
    int(probabilities(outputs.logits)[0].argmax())
    selected(outputs.prompt_weights, bundle.selection)
    end = time.perf_counter()
    return (ready - start) * 1e3, (computed - ready) * 1e3, (end - start) * 1e3
