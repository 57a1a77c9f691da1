"""Latency of a bundle on this machine: what is timed, how steady it was, and under which conditions."""

from __future__ import annotations

import io
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__
from ..artefacts.bundle import Bundle, open_bundle
from ..errors import InputError
from ..files import check_out, write_json
from ..folders import one_or_more
from ..machine import board, cpu_model, governor, peak_rss_bytes, temperature_c, version_of
from ..runtime import load
from ..runtime.predict import probabilities
from ..runtime.runner import Outputs, Runner
from ..runtime.select import selected
from .energy import Board, Meter, throttled

UNSTABLE_CV = 0.025
"coefficient of variation of the end-to-end time above which a result is flagged `unstable`"
JITTER_RATIO = 1.5
"p99 / p50 of the end-to-end time above which it is flagged `jitter`"
ENQUEUE_SHARE = 0.8
"enqueue / GPU time above which it is flagged `enqueue-bound`: the processor keeps the GPU waiting"
CALLS, SECONDS, LEAST = 1000, 10.0, 100
"timed calls unless told otherwise: CALLS, or fewer when SECONDS have passed, but LEAST in any case"
STAGES = ("preprocess_ms", "h2d_ms", "enqueue_ms", "gpu_ms", "d2h_ms", "compute_ms", "post_ms", "end_to_end_ms")
DEFINITIONS = {
    "preprocess_ms": "an encoded picture in memory to the graph's uint8 input: decode, scale, cut",
    "h2d_ms": "images to the GPU, by its own time stamps; enqueue_ms: handing it the work, of the CPU; gpu_ms: the "
    "computation, d2h_ms: outputs back, by its time stamps; all four inside compute_ms, TensorRT only",
    "compute_ms": "one call of the backend on one picture",
    "post_ms": "softmax, the first class, and which prompts were selected",
    "end_to_end_ms": "an encoded picture in memory to label, probability and prompts: preprocess, compute, post",
    "energy": "what the board (rails) or the processor package (RAPL) drew while the calls were timed, idle included",
    "load_ms": "create the session; check_ms: read the manifest and hash every file before it",
    "first_inference_ms": "the first call of the backend, not among the others",
    "std": "population standard deviation; cv = std / mean, a fraction",
    "flags": f"of end_to_end_ms: unstable: cv > {UNSTABLE_CV}; jitter: p99 / p50 > {JITTER_RATIO}; enqueue-bound: "
    f"median of enqueue_ms > {ENQUEUE_SHARE} x gpu_ms; throttled: the board lowered its clocks in the meantime",
}


def profile(
    bundle: Bundle | Path | str,
    backend: str = "auto",
    threads: int | None = None,
    runs: int | None = None,
    images: Sequence[Path | str | bytes] | None = None,
    warmup: int = 20,
    trace: Path | str | None = None,
    precision: str | None = None,
    sensors: Board | None = None,
) -> dict[str, Any]:
    """Load a bundle and time it, one picture a call, as a camera would.

    Args:
        backend, threads, precision: see `cdl_edge.runtime.load`.
        runs: timed calls; below 100 the p99 is the slowest call. None: 1000, or what 10 s allow, at least 100.
        images: encoded pictures (files are read before the clock starts), used in turn; None takes `synthetic_jpeg`.
        warmup: calls after the first one that are not counted.
        trace: where to write every sample as JSON: {stage: [ms, ...]} of all stages, with "backend" and "context".
        sensors: of power, clocks and heat; None: this machine's.

    Returns: {"end_to_end_ms", "preprocess_ms", "compute_ms", "post_ms", on TensorRT also "h2d_ms", "enqueue_ms",
        "gpu_ms", "d2h_ms" (see `statistics`), "load_ms", "first_inference_ms", "backend", "flags", "energy",
        "context", "definitions", "trace_ms": every end-to-end time in order}.

    Raises: InputError for runs < 1, warmup < 0, no image, an unreadable one, and what `load` raises.
    """
    if (runs is not None and runs < 1) or warmup < 0:
        raise InputError(
            "the number of runs is wrong", got=f"runs {runs}, warmup {warmup}", expected="runs >= 1, warmup >= 0"
        )
    if trace is not None:
        check_out(Path(trace), "a trace", _foreign, replace=True)
    begin = time.perf_counter()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    check_ms = None if isinstance(bundle, Bundle) else (time.perf_counter() - begin) * 1e3
    encoded, described = _encoded(opened, images)
    sensors = sensors or Board()

    with load(opened, backend, threads, precision=precision) as runner:
        first = opened.preprocessing.read(encoded[0])[None]
        begin = time.perf_counter()
        runner.run(first)
        first_inference_ms = (time.perf_counter() - begin) * 1e3
        for i in range(warmup):
            _timed(runner, encoded[i % len(encoded)])
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        before = sensors.facts()
        with Meter(sensors) as meter:
            samples = _calls(runner, encoded, runs)
        after = sensors.facts()
        resolved = runner.describe()
        load_ms, key = runner.load_ms, runner.key
        agreement = _agreement(runner)

    stages = {name: np.array([s[name] for s in samples]) for name in STAGES if name in samples[0]}
    table = {name: statistics(values) for name, values in stages.items()}
    extra: dict[str, Any] = {n: resolved[n] for n in ("gpu", "achieved", "memory", "cuda_graph") if n in resolved}
    graph = opened.manifest.graphs[key]
    slowed = throttled(before["limits"], after["limits"])
    context = {
        "bundle": opened.name,
        "precision": resolved["precision"],
        "batch": 1,
        "runs": len(samples),
        "warmup": warmup,
        "images": described,
        "check_ms": check_ms,
        "providers": resolved["providers"],
        "threads": resolved["threads"],
        **extra,
        "agreement": agreement,
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
        "power_mode": before["power_mode"],
        "clocks_mhz": {"before": before["clocks_mhz"], "after": after["clocks_mhz"]},
        "temperature_c": temperature_c(),
        "temperatures_c": {"before": before["temperatures_c"], "after": after["temperatures_c"]},
        "throttled_by": slowed,
        "load_average": busy,
        "peak_rss_bytes": peak_rss_bytes(),
        "files_bytes": {name: entry.bytes for name, entry in opened.manifest.files.items()},
        "graph_sha256": opened.manifest.files[graph].sha256,
        "manifest_sha256": opened.manifest.manifest_sha256,
    }
    if trace is not None:
        raw: dict[str, Any] = {name: values.tolist() for name, values in stages.items()}
        write_json(Path(trace), {**raw, "backend": resolved["backend"], "context": context})
    return {
        **{name: table[name] for name in STAGES if name in table},
        "load_ms": load_ms,
        "first_inference_ms": first_inference_ms,
        "backend": resolved["backend"],
        "flags": flags(table["end_to_end_ms"], table, slowed),
        "energy": meter.result(len(samples)),
        "context": context,
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


def flags(
    stage: Mapping[str, float | int],
    stages: Mapping[str, Mapping[str, float | int]] | None = None,
    throttled_by: Sequence[str] = (),
) -> list[str]:
    """What makes the numbers doubtful: "unstable", "jitter", "enqueue-bound", "throttled".

    stage: of end to end. stages: all of them, by name.
    """
    found = []
    if stage["cv"] > UNSTABLE_CV:
        found.append("unstable")
    if stage["p99"] > JITTER_RATIO * stage["p50"]:
        found.append("jitter")
    if stages and "gpu_ms" in stages and stages["enqueue_ms"]["p50"] > ENQUEUE_SHARE * stages["gpu_ms"]["p50"]:
        found.append("enqueue-bound")
    if throttled_by:
        found.append("throttled")
    return found


def _foreign(path: Path) -> str | None:
    """What an existing file is instead of a trace, see files.check_out."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return str(error).splitlines()[0][:100]
    ours = isinstance(found, dict) and {"end_to_end_ms", "backend", "context"} <= set(found)
    return None if ours else "JSON of another kind"


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
    images = one_or_more(images)
    if not images:
        raise InputError("no image to time", fix="name at least one, or none at all for a synthetic one")
    for image in images:
        bundle.preprocessing.read(image)  # an unreadable file is named here
    return [
        i if isinstance(i, bytes) else Path(i).read_bytes() for i in images
    ], f"{len(images)} given image(s), in turn"


def _calls(runner: Runner, encoded: Sequence[bytes], runs: int | None) -> list[dict[str, float]]:
    """What `_timed` says of each call; see `runs` of `profile`."""
    samples: list[dict[str, float]] = []
    begin = time.perf_counter()
    while len(samples) < (runs or CALLS):
        if runs is None and len(samples) >= LEAST and time.perf_counter() - begin > SECONDS:
            break
        samples.append(_timed(runner, encoded[len(samples) % len(encoded)]))
    return samples


def _timed(runner: Runner, encoded: bytes) -> dict[str, float]:
    """One picture: milliseconds of those of STAGES that the backend knows."""
    bundle, inside = runner.bundle, {}
    timed = getattr(runner.engine, "timed", None) if bundle.batch in (1, None) else None
    start = time.perf_counter()
    pixels = bundle.preprocessing.read(encoded)[None]
    ready = time.perf_counter()
    if timed is None:
        outputs = runner.run(pixels)
    else:
        named, inside = timed({runner.signature.images: pixels})
        outputs = Outputs(named["logits"], named.get("prompt_weights"))
    computed = time.perf_counter()
    int(probabilities(outputs.logits)[0].argmax())
    selected(outputs.prompt_weights, bundle.selection)
    end = time.perf_counter()
    times = {"preprocess_ms": ready - start, "compute_ms": computed - ready, "post_ms": end - computed}
    return {**{n: t * 1e3 for n, t in times.items()}, **inside, "end_to_end_ms": (end - start) * 1e3}


def _agreement(runner: Runner) -> dict[str, float | int] | None:
    """Compare with the fp32 student on the bundle's images: {"images", "top1" (%), "max_abs_error" (of a logit)}."""
    if not runner.bundle.manifest.selftest:
        return None
    images, expected = runner.bundle.selftest()
    got = runner.infer(images)
    same = 100.0 * float((got.argmax(1) == expected.argmax(1)).mean())
    return {"images": len(images), "top1": same, "max_abs_error": float(np.abs(got - expected).max())}
