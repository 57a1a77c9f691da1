"""Two latency reports: is one really faster, or is it noise?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

RESAMPLES = 2000
AT_ONCE = 2**18
"times that the bootstrap holds at once: a few MB"
SHARE = 0.95
"of the interval"
FLOOR = 0.02
"""ratios of medians within 1 +- FLOOR are no difference whatever the interval says: that much two runs of one bundle
differ by although nothing has changed (memory layout, clocks), which no resampling of a single run can know"""
PARTS = 8
"a run is cut into so many: their medians show how much the machine wanders"
FEW = 30
"calls below which nothing is said"
SAME = ("batch", "threads", "precision", "cpu", "board", "power_mode", "images", "governor", "gpu", "memory")
"of the context: where these differ, the difference is not the bundle's alone"


def compare(
    a: Path | str | Mapping[str, Any],
    b: Path | str | Mapping[str, Any],
    stage: str = "end_to_end_ms",
    floor: float | None = None,
) -> dict[str, Any]:
    """Say whether B is faster or slower than A.

    The ratio of medians, with its interval by a circular block bootstrap (Politis & Romano, 1992): neighbouring calls
    resemble each other (caches, clocks, other programs), so whole stretches of them are drawn, not single ones. Only an
    interval that lies beyond `floor` on one side is a difference.

    Args:
        a, b: what `profile` returned or its --trace wrote; or files of it.
        stage: key of both; only "end_to_end_ms" is in every report, a --trace has all.
        floor: least ratio of medians that counts, minus 1. None: FLOOR, or what the machine wandered within either run
            where that is more (see `wander`): by as much it may have moved between them.

    Returns: {"verdict" (of B: faster, slower or no difference), "ratio" (B / A), "interval", "a", "b" ("p50_ms", "n",
        "block", "wander"), "warnings", "stage", "floor" (as used)}.

    Raises: InputError for a file that is no report, lacks the stage, or has too few calls.
    """
    if floor is not None and not 0 <= floor < 1:
        raise InputError("the floor is out of range", got=floor, expected="0 to 1")
    reports = [_read(source) for source in (a, b)]
    traces = [_trace(source, report, stage) for source, report in zip((a, b), reports, strict=True)]
    wandered = [wander(trace) for trace in traces]
    floor = max(FLOOR, *wandered) if floor is None else floor
    rng = np.random.default_rng(0)
    blocks = [block_length(trace) for trace in traces]
    drawn = [bootstrap_medians(t, length, rng) for t, length in zip(traces, blocks, strict=True)]
    medians = [float(np.median(trace)) for trace in traces]
    low, high = np.quantile(drawn[1] / drawn[0], [(1 - SHARE) / 2, (1 + SHARE) / 2])
    if high < 1 - floor:
        verdict = "faster"
    elif low > 1 + floor:
        verdict = "slower"
    else:
        verdict = "no difference"
    sides = [
        {"p50_ms": median, "n": len(trace), "block": length, "wander": moved}
        for median, trace, length, moved in zip(medians, traces, blocks, wandered, strict=True)
    ]
    return {
        "verdict": verdict,
        "ratio": medians[1] / medians[0],
        "interval": [float(low), float(high)],
        "a": sides[0],
        "b": sides[1],
        "warnings": warnings(*reports),
        "stage": stage,
        "floor": floor,
    }


def warnings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What makes a comparison of two reports doubtful, one line each."""
    found = []
    contexts = [{"backend": r.get("backend"), **(r.get("context") or {})} for r in (a, b)]
    for key in ("backend", *SAME):
        values = [context.get(key) for context in contexts]
        if values[0] != values[1]:
            found.append(f"different {key.replace('_', ' ')}: {values[0]} and {values[1]}")
    for name, report, context in zip("AB", (a, b), contexts, strict=True):
        if not report.get("context"):
            found.append(f"{name} does not say under which conditions it was measured")
        found += [f"{name} is flagged {flag}" for flag in report.get("flags") or ()]
        load, cores = context.get("load_average"), context.get("cpu_count")
        if load and cores and load > cores:
            found.append(f"{name} was measured on a busy machine: load {load:.1f} on {cores} core(s)")
    return found


def wander(trace: np.ndarray) -> float:
    """Standard deviation of the medians of PARTS parts of a run, as a share of its median: other programs, clocks.

    Of six runs of one bundle while tests came and went, 6 of the 15 pairs differed by 9 to 15 % in the eyes of the
    bootstrap alone; within these runs the parts wandered by 2 to 9 %, and with that as the floor none of the pairs
    differed (EPYC, 2 cores, 2026-11-21).
    """
    medians = [np.median(part) for part in np.array_split(trace, PARTS)]
    return float(np.std(medians, ddof=1) / np.median(trace))


def block_length(trace: np.ndarray) -> int:
    """Calls that are drawn together: twice what they remember of each other, at least n^(1/3), at most n / 8.

    They remember up to the first lag whose autocorrelation is inside of what white noise would show (2 / sqrt(n)).
    Ranks are correlated, not times: one slow call must not hide what the others share. Of pairs of autoregressive runs
    (0.8 and 0.95) with nothing between them the interval then misses 1 for 10 to 12 %, of white ones for 5 to 8 %
    (twice the lag; once: 12 to 15 %, thrice: no better), before the floor.
    """
    n = len(trace)
    ranks = np.argsort(np.argsort(trace, kind="stable")).astype(np.float64)
    ranks -= ranks.mean()
    variance = float(ranks @ ranks)
    longest, least = max(1, n // 8), round(n ** (1 / 3))
    for lag in range(1, longest):
        if variance == 0 or float(ranks[lag:] @ ranks[:-lag]) / variance < 2 / n**0.5:
            return min(longest, max(least, 2 * lag))
    return longest


def bootstrap_medians(trace: np.ndarray, block: int, rng: np.random.Generator) -> np.ndarray:
    """Medians of RESAMPLES traces, each put together from blocks of the given one; float64 (RESAMPLES,)."""
    n = len(trace)
    count, together = -(-n // block), max(1, AT_ONCE // n)
    medians = np.empty(RESAMPLES)
    for first in range(0, RESAMPLES, together):
        rows = min(together, RESAMPLES - first)
        starts = rng.integers(0, n, (rows, count))
        index = (starts[:, :, None] + np.arange(block)).reshape(rows, -1)[:, :n] % n
        medians[first : first + rows] = np.median(trace[index], axis=1)
    return medians


def _read(source: Path | str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    expected, fix = "the output of `profile --json`, or a file that its --trace wrote", "run: cdl-edge profile BUNDLE"
    try:
        text = Path(source).read_text(encoding="utf-8").strip()
        report = json.loads(text if text.startswith("{") else (text.splitlines() or [""])[-1])
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{source}: no latency report", got=got, expected=expected, fix=fix) from error
    if not isinstance(report, dict):
        raise InputError(f"{source}: no latency report", got=type(report).__name__, expected=expected, fix=fix)
    return report


def _trace(source: object, report: Mapping[str, Any], stage: str) -> np.ndarray:
    """float64 (n,) milliseconds."""
    name = source if isinstance(source, (str, Path)) else "the report"
    found = report.get("trace_ms") if stage == "end_to_end_ms" and "trace_ms" in report else report.get(stage)
    if not isinstance(found, list):
        traces = [key for key, value in report.items() if isinstance(value, list) and key.endswith("_ms")]
        raise InputError(
            f"{name}: no raw times of {stage}",
            got=", ".join(traces) or "none at all",
            expected="every call's time",
            fix="compare what `profile --trace` wrote: it has all stages",
        )
    try:
        trace = np.asarray(found, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {stage} is not a list of times", got=str(error)) from error
    if trace.ndim != 1 or len(trace) < FEW or not np.isfinite(trace).all() or trace.min() <= 0:
        raise InputError(
            f"{name}: too few calls, or no times, in {stage}",
            got=f"{len(trace)} values",
            expected=f"{FEW} times above 0 or more",
            fix="profile with more --runs",
        )
    return trace
