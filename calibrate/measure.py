"""What 8 bits cost: accuracy per task before and after, forgetting, confidence, calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.predict import probabilities

BINS = 15
"of confidence, for the calibration error (Guo et al., arXiv 1706.04599)"
DEFINITIONS = {
    "per_task": "share (%) of a task's images that are right, among all classes; null where there are no images",
    "drop": "points of accuracy lost against fp32, per task and on average over the tasks with images",
    "quantisation_forgetting": "mean drop of the earlier tasks minus the drop of the last one, in points: above 0, "
    "8 bits hurt old tasks more",
    "confidence": "mean probability of the answer",
    "calibration_error": f"expected calibration error over {BINS} bins of confidence, in points",
    "agreement": "share (%) of images with the same answer as fp32",
    "paired": "answers that 8 bits lost and won on the same images, and how often chance alone loses so many (p, one "
    "side, exact)",
    "gate": "passed; failed: more than max_drop is lost, by more than chance; not decided: too few images to tell",
    "shortfall": "why this precision is not recommended here; null: nothing against it",
}


@dataclass(frozen=True)
class Measured:
    """Accuracy that was measured on one set of logits."""

    per_task: list[float | None]
    average_accuracy: float
    confidence: float
    calibration_error: float

    def to_json(self) -> dict[str, Any]:
        """The record for the manifest, as plain JSON values."""
        return dict(vars(self))


def measure(logits: np.ndarray, labels: np.ndarray, tasks: Sequence[Sequence[int]]) -> Measured:
    """logits (N, C), labels (N,) class indices, tasks: classes of each; tasks without images count for nothing."""
    answers, shares = logits.argmax(1), probabilities(logits).max(1)
    right = answers == labels
    per_task: list[float | None] = []
    for task in tasks:
        mine = np.isin(labels, task)
        per_task.append(100.0 * float(right[mine].mean()) if mine.any() else None)
    bins = np.minimum((shares * BINS).astype(int), BINS - 1)
    gaps = [
        abs(float(right[bins == b].mean() - shares[bins == b].mean())) * (bins == b).mean() for b in np.unique(bins)
    ]
    known = [a for a in per_task if a is not None]
    return Measured(per_task, float(np.mean(known)), float(shares.mean()), 100.0 * float(sum(gaps)))


def compare(before: Measured, after: Measured) -> dict[str, Any]:
    """{"drop": {"per_task", "average"}, "quantisation_forgetting", "confidence_shift", "calibration_error_shift"}."""
    drops = [None if a is None or b is None else b - a for b, a in zip(before.per_task, after.per_task, strict=True)]
    known = [d for d in drops if d is not None]
    earlier = [d for d in drops[:-1] if d is not None]
    last = drops[-1]
    return {
        "drop": {"per_task": drops, "average": float(np.mean(known))},
        "quantisation_forgetting": float(np.mean(earlier)) - last if earlier and last is not None else None,
        "confidence_shift": after.confidence - before.confidence,
        "calibration_error_shift": after.calibration_error - before.calibration_error,
    }


def average_drop(before: np.ndarray, after: np.ndarray, labels: np.ndarray, tasks: Sequence[Sequence[int]]) -> float:
    """Points of accuracy lost, mean over the tasks with images; before, after: whether answers are right, bool (N,)."""
    parts = [np.isin(labels, task) for task in tasks]
    return 100.0 * float(np.mean([before[mine].mean() - after[mine].mean() for mine in parts if mine.any()]))
