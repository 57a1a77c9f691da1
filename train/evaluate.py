"""Accuracy of a prompted ViT in torch, fp32, over decoded images."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..heartbeat import at
from ..log import LOG
from ..scored import find_scored
from .baseline import baseline_of
from .batches import Pipeline, TaskImages
from .devices import Devices, Share
from .metrics import DEFINITIONS
from .run import load_run
from .scenario import Scenario

CHUNK = 128


@torch.no_grad()
def logits_of(images: TaskImages, name: str, classes: int | None = None, rows: slice = slice(None)) -> np.ndarray:
    """Combined logits of the images in `rows`, float32 (N, C), cut to the first `classes`."""
    model = images.sides[name].model
    head = model.statistics_head
    if head is not None:
        features = features_of(images, name, rows)
        return np.concatenate([head(x)[:, :classes].float().cpu().numpy() for x in features])
    images.keep([name], nullcontext, CHUNK)
    parts = []
    wanted = np.arange(len(images))[rows]
    for start in range(0, len(wanted), CHUNK):
        at(f"{name}: pictures that are answered: {start:,} of {len(wanted):,}")
        batch = images.batch(wanted[start : start + CHUNK], [name], nullcontext)
        output = model(batch.inputs[name], batch.queries[name])
        parts.append(model.combine(output)[:, :classes].float().cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def features_of(images: TaskImages, name: str, rows: slice = slice(None)) -> list[torch.Tensor]:
    """What the statistics head of a model reads of the images in `rows`, in chunks, float32 (n, D).

    They are kept with the images: whoever changes the model clears `images.features`.
    """
    key = (name, rows.start, rows.stop)
    if key in images.features:
        return images.features[key]
    images.keep([name], nullcontext, CHUNK)
    model = images.sides[name].model
    parts = []
    wanted = np.arange(len(images))[rows]
    for start in range(0, len(wanted), CHUNK):
        at(f"{name}: features of the pictures: {start:,} of {len(wanted):,}")
        batch = images.batch(wanted[start : start + CHUNK], [name], nullcontext)
        features = model(batch.inputs[name], batch.queries[name]).features
        assert features is not None
        parts.append(features)
    images.features[key] = parts
    return parts


def predictions(images: TaskImages, name: str, seen: int, devices: Devices | None = None) -> np.ndarray:
    """Predicted classes, int64 (N,), among the first `seen`; the processes of a Devices share the images."""
    return answers(images, name, seen, devices)[0]


def answers(
    images: TaskImages, name: str, seen: int, devices: Devices | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a model answers among the first `seen` classes; the processes of a Devices share the images.

    Returns: predicted classes, int64 (N,); the probability of each, and that of the right class (0 for a class that is
    not among them), both float32 (N,).
    """
    rows, weight = (devices.share if devices else Share()).of(len(images))
    logits = logits_of(images, name, seen, rows)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    index, predicted, labels = np.arange(len(logits)), logits.argmax(1), images.labels[rows]
    known = labels < shares.shape[1]
    of_true = np.where(known, shares[index, np.where(known, labels, 0)], 0.0)
    own = np.stack([predicted, shares[index, predicted], of_true]).astype(np.float32)
    if devices is not None:
        # A process without images of its own gets one with weight 0: it adds nothing. Numbers of classes are exact in
        # float32.
        whole = torch.zeros(3, len(images))
        whole[:, rows] = torch.from_numpy(own) * (weight > 0)
        own = devices.sum(whole).cpu().numpy()
    return own[0].astype(np.int64), own[1], own[2]


def accuracy(images: TaskImages, name: str, seen: int, devices: Devices | None = None) -> float:
    """In %, predicting among the first `seen` classes; the processes of a Devices share the images."""
    return 100.0 * float((predictions(images, name, seen, devices) == images.labels).mean())


def evaluate_run(path: Path, source: str, limit_per_class: int | None = None, split: str = "auto") -> dict[str, Any]:
    """Accuracy per task of a finished run's student in torch; the same document as `measurement.evaluate`.

    split: one of data.SCORED. Raises: InputError when the source has no class of the run.
    """
    run = load_run(path)
    names = run.metrics.classes
    found = find_scored(source, split, run.metrics.document, names)
    for line in found.lines:
        LOG.info(line)
    if limit_per_class is not None:
        found = found.limited(limit_per_class, run.config.seed)
    # A class that is missing has no image: it may have any number that is nobody else's.
    number = {name: index for index, name in enumerate(found.dataset.classes)}
    order = tuple(number.setdefault(name, len(number)) for name in names)
    scenario = Scenario(order, run.metrics.tasks)
    device = torch.device("cpu")
    sides = {"student": Pipeline(run.student, run.preprocessing, device)}
    per_task: list[float | None] = []
    frozen, bare = baseline_of(run), []
    count, skipped = 0, []
    for task in range(len(scenario.tasks)):
        part = scenario.split(found.images, task)
        images = TaskImages(part, sides, device) if len(part) else None
        per_task.append(accuracy(images, "student", len(names)) if images is not None else None)
        if images is not None and frozen is not None:
            bare.append((frozen.features(images), images.labels))
        count += len(images) if images is not None else 0
        skipped += list(images.skipped) if images is not None else []
    matrix = run.metrics.student.matrix
    measured = [a for a in per_task if a is not None]
    drops = [(matrix[i][i] or 0.0) - a for i, a in enumerate(measured)]
    return {
        "average_accuracy": sum(measured) / len(measured),
        # Of other images the difference to what the training run has measured is anything but forgetting.
        "forgetting": sum(drops) / len(drops) if found.comparable else None,
        "baseline": frozen.compare(bare) if frozen is not None else None,
        "per_task": per_task,
        "images": count,
        "backend": "torch",
        "precision": "fp32",
        "skipped": skipped,
        "left_out": {
            "classes": len(set(found.dataset.classes) - set(names)),
            "images": int((~np.isin(found.images.labels, order)).sum()),
        },
        "missing": list(found.missing),
        "split": found.which,
        "data": found.dataset.summary,
        "definitions": {k: DEFINITIONS[k] for k in ("average_accuracy", "forgetting", "baseline")},
    }
