"""The images that are at hand, seen as the bundle sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artefacts.bundle import Bundle
from ..data import Split, check_spelling, held_out_early, load_dataset
from ..errors import InputError
from ..log import LOG

FEW = 32
"calibration images below which a warning is given; 500 are the usual advice"
PER_TASK = 64
"training images of each task to take ranges from, unless another number is given"
LARGEST_BYTES = 4 << 30


@dataclass(frozen=True)
class CalibrationImages:
    """Of the classes that a source and a bundle share."""

    training: np.ndarray
    "uint8 (N, S, S, 3), to take ranges from"
    validation: np.ndarray
    "uint8 (M, S, S, 3), to measure accuracy on"
    labels: np.ndarray
    "int64 (M,), the bundle's classes"
    tasks: tuple[int, ...]
    "tasks with training images"
    summary: dict[str, Any]
    "see data.Dataset.summary"
    whole: bool
    "every class of the bundle is there, with training images"


def images_of(
    bundle: Bundle,
    source: str,
    per_task: int,
    limit_per_class: int | None,
) -> CalibrationImages:
    """Read them. per_task: training images of each task. limit_per_class: validation images, drawn by the run's seed;
    None: all.

    Raises: InputError for a source that is not there, has no class of the bundle, or is too large to be held.
    """
    dataset = load_dataset(source, learning=False, early=held_out_early(bundle.manifest.training))
    LOG.info(dataset.line)
    check_spelling(source, dataset.classes, bundle.classes)
    position = {name: index for index, name in enumerate(bundle.classes)}
    mapped = np.array([position.get(name, -1) for name in dataset.classes])
    if (mapped < 0).all():
        raise InputError(
            f"{source}: no class of the bundle",
            got=", ".join(dataset.classes[:5]),
            expected="at least one of " + ", ".join(bundle.classes[:5]) + " ...",
            fix="name the images that the run was trained on, or those of its last task",
        )
    task_of = np.full(len(bundle.classes) + 1, -1)  # the last one: not learnt
    for task, classes in enumerate(bundle.tasks):
        task_of[list(classes)] = task
    given = mapped[dataset.train.labels]
    training = _spread(dataset.train, task_of[given], per_task)
    known = dataset.val.take(np.flatnonzero(mapped[dataset.val.labels] >= 0))
    if limit_per_class is not None:
        known = known.limited(limit_per_class, bundle.manifest.config.get("seed") or 0)
    size = (len(known) + len(training)) * 3 * bundle.preprocessing.size**2
    if size > LARGEST_BYTES:
        raise InputError(
            f"{source}: too many images to be held",
            got=f"{size / 1e9:.1f} GB",
            expected=f"{LARGEST_BYTES / 1e9:.1f} GB",
            fix="use --limit-per-class",
        )
    validation = known.decode(bundle.preprocessing, sampled=limit_per_class is not None)
    labels = mapped[validation.labels]
    tasks = tuple(sorted({int(t) for t in task_of[given[given >= 0]]}))
    whole = set(range(len(bundle.classes))) <= set(given.tolist())
    pixels = training.decode(bundle.preprocessing, sampled=True).pixels
    return CalibrationImages(pixels, validation.pixels, labels, tasks, dataset.summary, whole)


def _spread(split: Split, tasks: np.ndarray, per_task: int) -> Split:
    """`per_task` images of each task, evenly over its images."""
    chosen = [np.zeros(0, dtype=np.int64)]
    for task in np.unique(tasks[tasks >= 0]):
        mine = np.flatnonzero(tasks == task)
        count = min(per_task, len(mine))
        chosen.append(mine[np.arange(count) * len(mine) // count])
    return split.take(np.concatenate(chosen))
