"""Name what pictures show: labels with their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artefacts.bundle import Bundle
from ..errors import InputError
from ..folders import one_or_more
from ..heartbeat import at
from ..images import UnreadableImage
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
    skip_unreadable: bool = False,
    decoded: bool = False,
) -> dict[str, Any]:
    """Classify pictures.

    Args:
        student: what `runtime.load` gives, or what `runtime.policy.open_policy` gives: the pictures are then the next
            frames of its stream.
        sources: files, their bytes, or frames, uint8 RGB (H, W, 3).
        task: index into the manifest's tasks, from 0 (on the command line the first task is 1): only its classes
            compete. None: all of them do.
        top: with more than 1 each prediction also carries its `top` most probable classes, itself first.
        decoded: the sources are what `bundle.preprocessing.read` gives, uint8 RGB (size, size, 3).
        skip_unreadable: name what cannot be read in "unreadable": [{"image", "reason"}] and classify the others.

    Returns: {"backend", "precision", "definitions", "predictions": [{"image", "label", "index", "probability",
        "confidence", "unknown", "task", "task_posterior", "prompts": {"selected", "weights"}, "path", "top"}]}: "index"
        into the bundle's classes, "probability" the softmax over the classes that compete, "confidence" the calibrated
        probability of the label among all classes, "unknown" whether the image looks like none of them (None: the
        bundle has no threshold), "task" the index of the most probable one of "task_posterior", "path" a key of
        runtime.policy.PATHS, "top" only if asked.

    Raises: InputError for no picture, an unreadable one (named; with skip_unreadable only where all are), a task that
        is not there, top < 1, or a student whose answer is no number.
    """
    bundle, sources = student.bundle, one_or_more(sources)
    competing = _competing(bundle.tasks, len(bundle.classes), task)
    if top < 1:
        raise InputError("top is out of range", got=top, expected="1 or more")
    if not sources:
        raise InputError("no image to classify", fix="name at least one image")
    predictions: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    for start in range(0, len(sources), CHUNK):
        names, pixels = [], []
        for position, source in enumerate(sources[start : start + CHUNK], start):
            name = f"image {position}" if isinstance(source, (bytes, np.ndarray)) else str(source)
            try:
                pixels.append(np.asarray(source) if decoded else bundle.preprocessing.read(source))
                names.append(name)
            except UnreadableImage as error:
                unreadable.append({"image": name, "reason": " ".join(str(error).split())})
                if not skip_unreadable or len(unreadable) == len(sources):  # none is left
                    raise
        at(f"classified: {len(predictions):,} of {len(sources):,} images")
        if not pixels:
            continue
        step = _step(student, np.stack(pixels))
        check_finite(bundle, step.logits, names[0])
        share = probabilities(step.logits[:, competing])  # (b, len(competing))
        order = np.argsort(-share, axis=1, kind="stable")[:, :top]
        for i, name in enumerate(names):
            ranked = [
                {"label": bundle.classes[competing[j]], "index": int(competing[j]), "probability": float(share[i, j])}
                for j in order[i]
            ]
            prediction = {
                "image": name,
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
        **({"unreadable": unreadable} if skip_unreadable else {}),
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


def check_finite(bundle: Bundle, logits: np.ndarray, name: str) -> None:
    """Raises: InputError where the answer to the images from `name` on is no number: it would pass for a label."""
    if not np.isfinite(logits).all():
        raise InputError(
            f"{bundle.path}: the student's answer to {name} is no number",
            got="nan or inf among the logits",
            expected="finite logits",
            fix="its weights are not finite: train again with a smaller --learning-rate, and export again",
        )


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
