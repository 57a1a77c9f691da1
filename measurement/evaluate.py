"""Accuracy of a bundle on a data set's validation images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..images import Preprocessing, UnreadableImage
from ..log import LOG
from ..runtime.predict import check_finite
from ..runtime.runner import Runner
from ..scored import Scored, find_scored
from ..splits import Split

CHUNK = 32
"images decoded at a time: a board cannot hold a whole validation set"
DEFINITIONS = {
    "per_task": "for each task the share (%) of its images that are classified right, among all classes, "
    "without being told the task",
    "average_accuracy": "mean of per_task (%)",
    "forgetting": "mean over all tasks of (accuracy just after learning the task, in the training run) minus (per_task "
    "now), in points; null for other images than those that the training run was measured on, and when the bundle "
    "carries no accuracy matrix of its run",
}


def evaluate(runner: Runner, source: str, limit_per_class: int | None = None, split: str = "auto") -> dict[str, Any]:
    """Classify the images of a data source and count; what is read, and how far it is, is logged.

    Args:
        source, split: see `find_images`.
        limit_per_class: at most so many images of each class, drawn by the run's seed.

    Returns: what `score` does. Raises: InputError, as `find_images` and `score`.
    """
    if limit_per_class is not None and limit_per_class < 1:
        raise InputError("limit per class is out of range", got=limit_per_class, expected="1 or more")
    found = find_images(runner, source, split)
    if limit_per_class is not None:
        found = found.limited(limit_per_class, runner.bundle.manifest.config.get("seed") or 0)
    for line in found.lines:
        LOG.info(line)
    return score(runner, found, "classified")


def find_images(runner: Runner, source: str, split: str = "auto") -> Scored:
    """The images that a bundle is scored on: the validation images of a source, or all where it has no parts.

    Args:
        source: see `cdl_edge.data.load_dataset`. Classes are matched by name.
        split: one of data.SCORED, see data.Dataset.scored.

    Raises: InputError for a source that is not there, or that has no class of the bundle.
    """
    manifest = runner.bundle.manifest
    enrolled = {digest for entry in manifest.enrolments for digest in entry.digests}
    return find_scored(source, split, manifest.training or None, manifest.classes, enrolled)


def score(runner: Runner, found: Scored, progress: str | None = None) -> dict[str, Any]:
    """Classify these images and count; those of classes that the bundle has not learnt are left out and counted.

    progress: what is said to be done of how many images, five times; None: nothing is logged.

    Returns: {"average_accuracy": %, "forgetting": points or None, "per_task": [%, or None without an image], "images":
        n classified, "backend", "precision", "skipped": [a line for each unreadable image], "left_out": {"classes",
        "images"}, "missing": [classes of the bundle without an image], "split", "data", "definitions"}.

    Raises: InputError for a class without a readable image.
    """
    bundle = runner.bundle
    training = bundle.manifest.training or {}
    dataset = found.dataset
    position = {name: index for index, name in enumerate(bundle.classes)}
    mapped = np.array([position.get(name, -1) for name in dataset.classes])[found.images.labels]  # (N,), -1: not learnt
    known = found.images.take(np.flatnonzero(mapped >= 0))
    truth = mapped[mapped >= 0]

    right = np.zeros(len(bundle.classes), dtype=np.int64)
    seen = np.zeros(len(bundle.classes), dtype=np.int64)
    skipped: list[str] = []
    done = told = 0
    for index, pixels, problems in _decoded(known, bundle.preprocessing):
        skipped += problems
        done += len(index) + len(problems)
        labels = truth[index]
        logits = runner.infer(pixels)
        check_finite(bundle, logits, f"the images of {dataset.source}")
        answers = logits.argmax(axis=1)
        np.add.at(seen, labels, 1)
        np.add.at(right, labels[answers == labels], 1)
        if progress is not None and (fifths := 5 * done // len(known)) > told:
            told = fifths
            LOG.info(f"{progress}: {done} of {len(known)} images")
    lost = [n for n, count in zip(bundle.classes, seen, strict=True) if count == 0 and n not in found.missing]
    if lost:
        raise InputError(
            f"{dataset.source}: {len(lost)} class(es) without a readable validation image",
            got=", ".join(lost[:8]) + (f"; {skipped[0]}" if skipped else ""),
            expected="at least one image a class",
            fix="replace the files",
        )

    sums = [(int(right[list(task)].sum()), int(seen[list(task)].sum())) for task in bundle.tasks]
    per_task = [100.0 * good / count if count else None for good, count in sums]
    measured = [accuracy for accuracy in per_task if accuracy is not None]
    return {
        "average_accuracy": float(np.mean(measured)),
        # Of other images the difference to what the training run has measured is anything but forgetting.
        "forgetting": forgetting(training, measured) if found.comparable else None,
        "per_task": per_task,
        "images": int(seen.sum()),
        "backend": runner.describe()["backend"],
        "precision": runner.describe()["precision"],
        "skipped": skipped,
        "left_out": {
            "classes": len(set(dataset.classes) - set(bundle.classes)),
            "images": int((mapped < 0).sum()),
        },
        "missing": list(found.missing),
        "split": found.which,
        "data": dataset.summary,
        "definitions": DEFINITIONS,
    }


def forgetting(training: Mapping[str, Any], per_task: Sequence[float]) -> float | None:
    """Mean over tasks of the run's diagonal accuracy minus the accuracy now, in points; None without a whole diagonal.

    Source: (1/T) sum_i (accuracy of task i just after it - at the end), see train/metrics.py.
    """
    matrix = (training.get("student") or {}).get("matrix")
    if not isinstance(matrix, list) or len(matrix) != len(per_task):
        return None
    diagonal = [row[i] if isinstance(row, list) and i < len(row) else None for i, row in enumerate(matrix)]
    if any(value is None for value in diagonal):
        return None
    return float(np.mean(np.asarray(diagonal, dtype=np.float64) - np.asarray(per_task)))


def _decoded(split: Split, preprocessing: Preprocessing) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """CHUNK images at a time: positions in the split int64 (b,), uint8 (b, S, S, 3), one line a broken image."""

    for start in range(0, len(split), CHUNK):
        index: list[int] = []
        pixels: list[np.ndarray] = []
        problems: list[str] = []
        for i in range(start, min(start + CHUNK, len(split))):
            try:
                pixels.append(preprocessing.read(split.items[i]))
                index.append(i)
            except UnreadableImage as error:
                problems.append(" ".join(str(error).split()))
        side = preprocessing.size
        stacked = np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8)
        yield np.asarray(index, dtype=np.int64), stacked, problems
