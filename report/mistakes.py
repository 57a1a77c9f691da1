"""What people ask first: how good is it, and what does it take for what? From a run's metrics, checked."""

from __future__ import annotations

from typing import Any

from ..artefacts.run_record import Metrics
from .charts import heat_cell
from .words import HEADS

PAIRS = 10
WORST = 10
"rows of the two tables"


def chance(accuracy: float, images: int) -> float:
    """Points to either side by which chance moves an accuracy in % measured on so many images (95 % interval)."""
    share = min(max(accuracy / 100, 0.5 / images), 1 - 0.5 / images)
    return float(196 * (share * (1 - share) / images) ** 0.5)


def verdict(metrics: Metrics) -> dict[str, Any]:
    """{"sentences": [two], "good": whether the student beats the frozen baseline}.

    good is None without a baseline, and where the student is above it by less than chance moves an accuracy.
    """
    baseline, accuracy, images = metrics.baseline, metrics.student.average_accuracy, metrics.counts.val
    first = f"The student names {accuracy:.1f} % of the held-out pictures rightly"
    if len(metrics.tasks) > 1:
        first += f" (mean over {len(metrics.tasks)} tasks)"
    classes = f" among {len(metrics.classes):,} classes"
    first += classes + (f"; {images:,} pictures were held out" if images else "") + "."
    if baseline is None:
        return {"sentences": [first, "How a frozen backbone does on the same pictures was not recorded."], "good": None}
    other, head = baseline.average_accuracy, HEADS.get(baseline.head, baseline.head)
    gap = accuracy - other
    if metrics.config.get("learner") == "frozen":
        own = HEADS.get(str(metrics.config.get("head")), "learnt head").removesuffix(" head")
        second = f"It is the frozen backbone with a {own} head: nothing else was learnt."
        if other - accuracy >= 0.05:
            second = f"{second[:-1]}; with a {head} head it names {other:.1f} %."
        return {"sentences": [first, second], "good": None}
    frozen = f"the frozen backbone with a {head} head, which takes seconds and no training: {other:.1f} %"
    if abs(gap) < 0.05:
        second = f"That is no better than {frozen}."
    elif gap > 0:
        second = f"That is {gap:.1f} points more than {frozen}."
    else:
        second = f"That is {-gap:.1f} points less than {frozen}: use --learner frozen, or give it more pictures."
    unsure = bool(images) and abs(gap) < chance(accuracy, images or 1)
    if unsure and abs(gap) >= 0.05:
        second = (
            second[:-1] + f" (on so few pictures a difference below {chance(accuracy, images or 1):.1f} may be chance)."
        )
    return {"sentences": [first, second], "good": False if gap <= -0.05 else None if unsure else gap > 0}


def mistakes_section(metrics: Metrics) -> dict[str, Any] | None:
    """Confusion matrix, most confused pairs and worst classes; None for a run that has not counted them."""
    found = metrics.student.confusion
    if not found or not sum(found.images):
        return None
    names, images, right = metrics.classes, found.images, found.right
    measured = [c for c in range(len(names)) if images[c]]
    worst = sorted(measured, key=lambda c: (right[c] / images[c], -images[c]))
    rows = None
    if found.matrix is not None:
        rows = [
            {
                "name": names[c],
                "cells": [_cell(count, images[c], names[c], names[j]) for j, count in enumerate(row)],
                "share": f"{100 * right[c] / images[c]:.0f} %" if images[c] else "",
            }
            for c, row in enumerate(found.matrix)
        ]
    return {
        "names": list(names),
        "rows": rows,
        "pairs": [
            (names[true], names[answer], f"{count:,} of {images[true]:,}")
            for true, answer, count in found.pairs[:PAIRS]
        ],
        "classes": [
            {
                "name": names[c],
                "share": round(100 * right[c] / images[c]),
                "text": f"{100 * right[c] / images[c]:.0f} %",
                "count": f"{right[c]:,} of {images[c]:,}",
            }
            for c in worst
        ],
        "shown": WORST,
        "few": min(images[c] for c in measured),
    }


def _cell(count: int, images: int, true: str, answer: str) -> dict[str, Any] | None:
    """Count with a colour by its share of the class's images; None for 0."""
    if not count:
        return None
    step = (heat_cell(100 * count / images, 0.0, 100.0) or {})["step"]
    plural = "pictures" if images != 1 else "picture"
    return {"text": f"{count:,}", "step": step, "title": f"{count:,} of {images:,} {plural} of {true}: called {answer}"}
