"""Accuracy of a bundle on a data set's validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..data import Split, load_dataset
from ..errors import InputError
from ..images import Preprocessing, UnreadableImage
from .runner import Runner

CHUNK = 32
"images decoded at a time: a board cannot hold a whole validation set"
DEFINITIONS = {
    "per_task": "for each task the share (%) of its validation images that are classified right, among all classes, "
    "without being told the task",
    "average_accuracy": "mean of per_task (%)",
    "forgetting": "mean over all tasks of (accuracy just after learning the task, in the training run) minus (per_task "
    "now), in points; null when the bundle carries no accuracy matrix of its run",
}


def evaluate(
    runner: Runner,
    source: str,
    limit_per_class: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Classify the validation images of a data source and count.

    Args:
        source: see `cdl_edge.data.load_dataset`. Classes are matched by name; those the bundle has not learnt are left
            out and counted.
        limit_per_class: at most so many images of each class, drawn by the run's seed.
        progress: called with (images done, images in all) after every chunk.

    Returns: {"average_accuracy": %, "forgetting": points or None, "per_task": [%], "images": n classified, "backend",
        "precision", "skipped": [a line for each unreadable image], "left_out": {"classes", "images"}, "definitions"}.

    Raises: InputError for a source that is not there, lacks a class of the bundle, or has no readable image of one.
    """
    if limit_per_class is not None and limit_per_class < 1:
        raise InputError("limit per class is out of range", got=limit_per_class, expected="1 or more")
    bundle = runner.bundle
    dataset = load_dataset(source, learning=False)
    missing = [name for name in bundle.classes if name not in set(dataset.classes)]
    if missing:
        raise InputError(
            f"{source}: class count mismatch: {len(missing)} of the bundle's {len(bundle.classes)} classes are missing",
            got="without " + ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else ""),
            expected="every class of the bundle, by name",
            fix="evaluate on the data the bundle was trained on, or rename the class folders",
        )
    training = bundle.manifest.get("training") or {}
    seed = (training.get("config") or {}).get("seed")
    split = dataset.val.limited(limit_per_class, seed or 0) if limit_per_class else dataset.val
    position = {name: index for index, name in enumerate(bundle.classes)}
    mapped = np.array([position.get(name, -1) for name in dataset.classes])[split.labels]  # (N,), -1: not learnt
    known = split.take(np.flatnonzero(mapped >= 0))
    truth = mapped[mapped >= 0]

    right = np.zeros(len(bundle.classes), dtype=np.int64)
    seen = np.zeros(len(bundle.classes), dtype=np.int64)
    skipped: list[str] = []
    done = 0
    for index, pixels, problems in _decoded(known, bundle.preprocessing):
        skipped += problems
        done += len(index) + len(problems)
        labels = truth[index]
        answers = runner.infer(pixels).argmax(axis=1)
        np.add.at(seen, labels, 1)
        np.add.at(right, labels[answers == labels], 1)
        if progress is not None:
            progress(done, len(known))
    if not seen.all():
        lost = [name for name, count in zip(bundle.classes, seen, strict=True) if count == 0]
        raise InputError(
            f"{source}: {len(lost)} class(es) without a readable validation image",
            got=", ".join(lost[:8]) + (f"; {skipped[0]}" if skipped else ""),
            expected="at least one image a class",
            fix="replace the files",
        )

    per_task = [100.0 * float(right[list(task)].sum() / seen[list(task)].sum()) for task in bundle.tasks]
    return {
        "average_accuracy": float(np.mean(per_task)),
        "forgetting": forgetting(training, per_task),
        "per_task": per_task,
        "images": int(seen.sum()),
        "backend": runner.describe()["backend"],
        "precision": runner.describe()["precision"],
        "skipped": skipped,
        "left_out": {
            "classes": len(set(dataset.classes) - set(bundle.classes)),
            "images": int((mapped < 0).sum()),
        },
        "definitions": DEFINITIONS,
    }


def fifths(what: str, say: Callable[[str], None]) -> Callable[[int, int], None]:
    """A `progress` that says a line after each fifth of the images."""
    said = 0

    def progress(done: int, count: int) -> None:
        nonlocal said
        if count and (step := 5 * done // count) > said:
            said = step
            say(f"{what}: {done} of {count} images")

    return progress


def forgetting(training: Mapping[str, Any], per_task: Sequence[float]) -> float | None:
    """Mean over tasks of the run's diagonal accuracy minus the accuracy now, in points; None without a whole diagonal.

    Source: (1/T) sum_i (accuracy of task i just after it - at the end), design/ALGORITHMS.md.
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
