"""Accuracy of a prompted ViT in torch, fp32, over decoded images."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import load_dataset
from ..errors import InputError
from .batches import Images, Side
from .engine import Engine, Share
from .metrics import DEFINITIONS
from .run import load_run
from .scenario import Scenario

CHUNK = 128


@torch.no_grad()
def logits_of(images: Images, name: str, classes: int | None = None, rows: slice = slice(None)) -> np.ndarray:
    """Combined logits of the images in `rows`, float32 (N, C), cut to the first `classes`."""
    images.keep([name], nullcontext, CHUNK)
    model = images.sides[name].model
    parts = []
    wanted = np.arange(len(images))[rows]
    for start in range(0, len(wanted), CHUNK):
        batch = images.batch(wanted[start : start + CHUNK], [name], nullcontext)
        output = model(batch.inputs[name], batch.queries[name])
        parts.append(model.combine(output)[:, :classes].float().cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def features_of(images: Images, name: str) -> list[torch.Tensor]:
    """What the statistics head of a model reads of every image, in chunks, float32 (n, D)."""
    images.keep([name], nullcontext, CHUNK)
    model = images.sides[name].model
    parts = []
    for start in range(0, len(images), CHUNK):
        index = np.arange(start, min(start + CHUNK, len(images)))
        batch = images.batch(index, [name], nullcontext)
        features = model(batch.inputs[name], batch.queries[name]).features
        assert features is not None
        parts.append(features)
    return parts


def accuracy(images: Images, name: str, seen: int, engine: Engine | None = None) -> float:
    """In %, predicting among the first `seen` classes; the processes of an engine share the images."""
    rows, weight = (engine.share if engine else Share()).of(len(images))
    right = (logits_of(images, name, seen, rows).argmax(1) == images.labels[rows]).sum() * (weight > 0)
    total = float(engine.sum(torch.tensor(float(right)))) if engine else float(right)
    return 100.0 * total / len(images)


def evaluate_run(path: Path, source: str, limit_per_class: int | None = None) -> dict[str, Any]:
    """Accuracy per task of a finished run's student in torch; the same document as `runtime.evaluate`.

    Raises: InputError when the source lacks a class of the run.
    """
    run = load_run(path)
    dataset = load_dataset(source, learning=False)
    names = run.metrics["classes"]
    missing = sorted(set(names) - set(dataset.classes))
    if missing:
        raise InputError(
            f"{source}: class count mismatch: {len(missing)} of the run's {len(names)} classes are missing",
            got="without " + ", ".join(missing[:8]),
            expected="every class of the run, by name",
        )
    val = dataset.val if limit_per_class is None else dataset.val.limited(limit_per_class, run.config.seed)
    order = tuple(dataset.classes.index(n) for n in names)
    scenario = Scenario(order, tuple(tuple(t) for t in run.metrics["tasks"]))
    device = torch.device("cpu")
    sides = {"student": Side(run.student, run.preprocessing, device)}
    per_task, count, skipped = [], 0, []
    for task in range(len(scenario.tasks)):
        images = Images(scenario.split(val, task), sides, device)
        per_task.append(accuracy(images, "student", len(names)))
        count += len(images)
        skipped += list(images.skipped)
    matrix = run.metrics["student"]["matrix"]
    drops = [matrix[i][i] - a for i, a in enumerate(per_task)]
    return {
        "average_accuracy": sum(per_task) / len(per_task),
        "forgetting": sum(drops) / len(drops),
        "per_task": per_task,
        "images": count,
        "backend": "torch",
        "precision": "fp32",
        "skipped": skipped,
        "definitions": {k: DEFINITIONS[k] for k in ("average_accuracy", "forgetting")},
    }
