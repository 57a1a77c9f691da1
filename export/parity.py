"""The gate: a bundle gets its name only when it computes what the trained student computes, on real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data import Split
from ..errors import GateError
from ..heartbeat import at
from ..runtime.runner import Runner
from ..train.augment import Normalise
from ..train.run import Run

TOLERANCE = 1e-4
"largest allowed |difference of logits|, fp32 against fp32"
LOW_PRECISION = {"fp16": (0.002, 99.0), "bf16": (0.02, 97.0)}
"""precision -> largest allowed mean |difference| as a share of the spread of the logits, least top-1 agreement in %.
Not the largest: where two entries of a pool are equally near, rounding chooses the other one, and the logits jump."""
CHUNK = 32


@dataclass(frozen=True)
class Parity:
    """What was compared and how far apart it was."""

    max_abs_error: float
    mean_abs_error: float
    top1_agreement: float
    "in %"
    images: int
    tolerance: float
    judged: str = "max_abs_error"
    "which of the errors the tolerance is for"

    def to_json(self) -> dict[str, Any]:
        """The record as the manifest holds it."""
        return dict(vars(self))


@torch.no_grad()
def student_logits(run: Run, pixels: np.ndarray, classes: int) -> np.ndarray:
    """The torch student in fp32: uint8 (B, S, S, 3) -> float32 (B, classes)."""
    student = run.student
    normalise = Normalise(run.preprocessing, torch.device("cpu"))
    parts = []
    for start in range(0, len(pixels), CHUNK):
        at(f"the trained student answers: {start:,} of {len(pixels):,} pictures")
        tokens = student.prepare(normalise(pixels[start : start + CHUNK]))
        parts.append(student.combine(student(tokens))[:, :classes].numpy())
    return np.concatenate(parts)


def sample(split: Split, count: int) -> Split:
    """`count` images spread evenly over a split (all, if there are fewer)."""
    if len(split) <= count:
        return split
    return split.take(np.linspace(0, len(split) - 1, count).round().astype(np.int64))


def logits_of(runner: Runner, pixels: np.ndarray) -> np.ndarray:
    """Logits of a loaded graph: pixels uint8 (B, S, S, 3) -> float32 (B, C)."""
    return np.concatenate([runner.infer(pixels[i : i + CHUNK]) for i in range(0, len(pixels), CHUNK)])


def logits_of_passes(query: Runner, prompted: Runner, pixels: np.ndarray) -> np.ndarray:
    """As `logits_of`, by the query graph and the prompted graph one after the other."""
    parts = []
    for start in range(0, len(pixels), CHUNK):
        images = pixels[start : start + CHUNK]
        parts.append(prompted.run(images, **query.compute({query.signature.images: images})).logits)
    return np.concatenate(parts)


def compare(expected: np.ndarray, got: np.ndarray, precision: str = "fp32", name: str = "the graph") -> Parity:
    """Logits (B, C) of the student and of a graph. Raises: GateError beyond what the precision allows, or for NaN."""
    tolerance, least, judged = TOLERANCE, 0.0, "max_abs_error"
    if precision != "fp32":
        share, least = LOW_PRECISION[precision]
        tolerance, judged = share * float(np.ptp(expected)), "mean_abs_error"
    difference = np.abs(got.astype(np.float64) - expected)
    agreement = 100.0 * float((got.argmax(1) == expected.argmax(1)).mean())
    parity = Parity(float(difference.max()), float(difference.mean()), agreement, len(expected), tolerance, judged)
    if not getattr(parity, judged) <= tolerance or agreement < least:  # the former also for NaN
        raise GateError(
            f"{name} does not equal the trained student: |difference of logits| max {parity.max_abs_error:.3e}, "
            f"mean {parity.mean_abs_error:.3e} over {parity.images} real images, allowed {judged} {tolerance:.0e}; "
            f"top-1 agreement {agreement:.2f} %, at least {least:.0f} %; nothing was written"
        )
    return parity
