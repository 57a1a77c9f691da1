"""How long one image takes in each precision that runs here, measured in turns."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artefacts.bundle import Bundle
from ..errors import GateError, InputError
from ..runtime import load
from ..runtime.runner import Runner
from ..runtime.selftest import Feeds, check, reference

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


@dataclass(frozen=True)
class TimedCandidate:
    """One backend in one precision, with its time and its answers."""

    backend: str
    precision: str
    compute_ms: float
    "median over the calls"
    ratio: float
    "to the first candidate's time, median over the turns"
    answers: np.ndarray
    "logits (N, C) about the images that were given"
    failed: str | None = None
    "what a device's self-test would refuse it for; None: it passes"

    def to_json(self) -> dict[str, Any]:
        """The record for the manifest: what was timed."""
        return {k: v for k, v in vars(self).items() if k not in ("answers", "failed")}


def time_candidates(bundle: Bundle, images: np.ndarray, threads: int | None = 1) -> list[TimedCandidate]:
    """Time every candidate on the first of the images, uint8 (N, S, S, 3), and take its answers to all of them.

    A turn is one call of each, in an order that is drawn anew for every turn (seed 0).
    What cannot run here is left out: another processor, no OpenVINO, no graph of that precision. Answers come from the
    session that was timed: each candidate is loaded once. It also answers the bundle's self-test, as on a device.
    """
    asked = reference(bundle) if bundle.manifest.selftest else None
    with ExitStack() as stack:
        runners = {}
        for backend, precision in CANDIDATES:
            try:
                runners[backend, precision] = stack.enter_context(load(bundle, backend, threads, precision=precision))
            except InputError:
                continue
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
        keys, rng = list(runners), np.random.default_rng(0)
        for turn in range(CALLS + 3):
            for at in rng.permutation(len(keys)):  # a fixed order would let one candidate always follow the same other
                begin = time.perf_counter()
                runners[keys[at]].run(images[:1])
                if turn >= 3:
                    times[keys[at]].append((time.perf_counter() - begin) * 1e3)
        answers = {key: runner.infer(images) for key, runner in runners.items()}
        failed = {key: _failed(runner, *asked) if asked else None for key, runner in runners.items()}
    first = next(iter(times.values()))
    return [
        TimedCandidate(
            *key,
            statistics.median(values),
            statistics.median(a / b for a, b in zip(values, first, strict=True)),
            answers[key],
            failed[key],
        )
        for key, values in times.items()
    ]


def _failed(runner: Runner, feeds: Feeds, expected: Feeds) -> str | None:
    try:
        check(runner.compute, feeds, expected, runner.precision, "the self-test fails")
    except GateError as error:
        what, got, *_ = (line.strip() for line in str(error).splitlines())
        return f"{what} ({got.removeprefix('got:').strip()})"
    return None
