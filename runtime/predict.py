"""From pictures to labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .policy import Selector, Step
from .runner import Runner

DEFINITIONS = {
    "probability": "share of the softmax among the classes that compete, as the student was trained; not calibrated",
    "confidence": "calibrated probability of the label among all classes: of answers with 80 %, 80 % are right",
    "task": "the most probable task; in JSON its index, from 0 as the index of a class",
}
CHUNK = 32
"images in one call of the runner: bounds the memory of a graph with a free batch size"


def predict(
    student: Runner | Selector,
    sources: Sequence[Path | str | bytes | np.ndarray],
    task: int | None = None,
    top: int = 1,
) -> dict[str, Any]:
    """Classify pictures.

    Args:
        student: what `runtime.load` gives, or what `runtime.policy.open_policy` gives: the pictures are then the next
            frames of its stream.
        sources: files, their bytes, or frames, uint8 RGB (H, W, 3). All are read before the first is classified.
        task: index into the manifest's tasks, from 0 (on the command line the first task is 1): only its classes
            compete. None: all of them do.
        top: with more than 1 each prediction also carries its `top` most probable classes, itself first.

    Returns: {"backend", "precision", "definitions", "predictions": [{"image", "label", "index", "probability",
        "confidence", "unknown", "task", "task_posterior", "prompts": {"selected", "weights"}, "path", "top"}]}: "index"
        into the bundle's classes, "probability" the softmax over the classes that compete, "confidence" the calibrated
        probability of the label among all classes, "unknown" whether the image looks like none of them (None: the
        bundle has no threshold), "task" the index of the most probable one of "task_posterior", "path" a key of
        runtime.policy.PATHS, "top" only if asked.

    Raises: InputError for no picture, an unreadable one (named), a task that is not there, or top < 1.
    """
    bundle = student.bundle
    competing = _competing(bundle.tasks, len(bundle.classes), task)
    if top < 1:
        raise InputError("top is out of range", got=top, expected="1 or more")
    if not sources:
        raise InputError("no image to classify", fix="name at least one image")
    preprocessing = bundle.preprocessing
    pixels = np.stack([preprocessing.read(source) for source in sources])

    predictions: list[dict[str, Any]] = []
    for start in range(0, len(pixels), CHUNK):
        step = _step(student, pixels[start : start + CHUNK])
        share = probabilities(step.logits[:, competing])  # (b, len(competing))
        order = np.argsort(-share, axis=1, kind="stable")[:, :top]
        for i in range(len(share)):
            ranked = [
                {"label": bundle.classes[competing[j]], "index": int(competing[j]), "probability": float(share[i, j])}
                for j in order[i]
            ]
            source = sources[start + i]
            prediction = {
                "image": f"image {start + i}" if isinstance(source, (bytes, np.ndarray)) else str(source),
                **ranked[0],
                "confidence": float(step.probabilities[i, competing[order[i, 0]]]),
                "unknown": None if step.unknown is None else bool(step.unknown[i]),
                "task": int(step.task_posterior[i].argmax()),
                "task_posterior": step.task_posterior[i].tolist(),
                "prompts": step.prompts[i],
                "path": step.paths[i],
            }
            predictions.append(prediction if top == 1 else {**prediction, "top": ranked})
    about = student.describe()
    return {
        "backend": about["backend"],
        "precision": about["precision"],
        "predictions": predictions,
        "definitions": DEFINITIONS,
    }


def _step(student: Runner | Selector, images: np.ndarray) -> Step:
    if isinstance(student, Selector):
        return student.step(images)
    outputs = student.run(images)
    path = "query" if student.bundle.two_pass else "single"
    return Step(outputs.logits, outputs.prompt_weights, student.bundle, student.certainty, (path,) * len(images))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64 so that a row sums to 1."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def _competing(tasks: Sequence[Sequence[int]], classes: int, task: int | None) -> np.ndarray:
    """int64 (C',): the classes that may win."""
    if task is None:
        return np.arange(classes)
    if not 0 <= task < len(tasks):
        raise InputError(
            "the bundle has no such task",
            got=f"task {task + 1} (index {task})",
            expected=f"tasks 1 to {len(tasks)} (indices 0 to {len(tasks) - 1})",
        )
    return np.asarray(sorted(tasks[task]), dtype=np.int64)
