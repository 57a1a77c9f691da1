"""What a head forgets although no statistic is stale: the part of forgetting that comes with more classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..class_statistics import ClassStatistics
from .batches import TaskImages
from .closed_form import StatisticsHead, as_numpy, make
from .config import TrainConfig
from .evaluate import features_of
from .metrics import AccuracyMatrix
from .scenario import Scenario

SAME = "prompts learnt in the first task only: every statistic is of the final student, so it is the run's forgetting"
NO_IMAGES = "unknown: the run that this one extends has images that are not read again"


def forgetting_of_joint(
    config: TrainConfig,
    own: float,
    head: StatisticsHead,
    scenario: Scenario,
    classes: Sequence[str],
    images: tuple[Iterable[TaskImages], Iterable[TaskImages]] | None,
) -> dict[str, Any]:
    """{"forgetting_of_joint": points or None, "forgetting_of_joint_note"}, as metrics.DEFINITIONS says.

    own: the run's forgetting in points. images: training and validation images of each task; None: no longer there.
    The rest as for `matrix_of_joint`.
    """
    value: float | None = own
    note = SAME
    if any(config.learns_prompts(task) for task in range(1, len(scenario.tasks))):
        value, note = None, NO_IMAGES
        if images is not None:
            matrix = matrix_of_joint(*images, head, scenario, classes, config.seed)
            value, note = matrix.forgetting_after(len(scenario.tasks) - 1), "measured"
    return {"forgetting_of_joint": value, "forgetting_of_joint_note": note}


@torch.no_grad()
def matrix_of_joint(
    train: Iterable[TaskImages],
    val: Iterable[TaskImages],
    head: StatisticsHead,
    scenario: Scenario,
    classes: Sequence[str],
    seed: int,
) -> AccuracyMatrix:
    """The accuracy matrix of heads made from statistics that the final student collects.

    Args:
        train, val: images of each task, in order. The student is "student" among their sides.
        head: of that student; as it was when this returns.
        classes: names in learned order. seed: of the run.
    """
    kept = {k: v.clone() for k, v in head.state_dict().items()}
    held_out = [(torch.cat(features_of(images, "student")), images.labels) for images in val]
    matrix, total = AccuracyMatrix(len(scenario.tasks)), None
    for task, images in enumerate(train):
        first, seen = scenario.tasks[task][0], scenario.seen(task)
        x = as_numpy(features_of(images, "student"))
        part = ClassStatistics.of(head.map, x, images.labels - first, classes[first:seen])
        total = part if total is None else total + part
        head.set(make(head.kind, total, seed))
        row = []
        for features, labels in held_out[: task + 1]:
            predicted = head(features)[:, :seen].argmax(1).cpu().numpy()
            row.append(100.0 * float((predicted == labels).mean()))
        matrix.add(row)
    head.load_state_dict(kept)
    return matrix
