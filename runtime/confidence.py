"""How sure the student is: calibrated probabilities, the task that an image comes from, and "none of what I know"."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import read_npz
from ..artefacts.bundle import Bundle
from ..errors import InputError

SHARE = 0.05
"share of known images that may be called unknown"
RANGE = (1 / 8, 8.0)
"of the temperature: a few images that are all right, or all wrong, would push it to 0 or infinity"
SCALE = 64.0
"largest weight of a cosine in the task posterior"
STEPS = 48
"of the golden section: the interval shrinks to 1e-10 of its width"
WEIGHTS = "prompt_weights"


@dataclass(frozen=True)
class Confidence:
    """What `export` found out on images that training has not seen; of an old bundle: a temperature of 1 and no more.

    Sources: temperature scaling: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Energy as the score
    for the unknown: Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020.
    """

    tasks: tuple[tuple[int, ...], ...]
    "classes of each task"
    temperature: float = 1.0
    "logits are divided by it"
    unknown_below: float | None = None
    "logsumexp of the logits below which an image is called unknown; None: nobody knows"
    task_scale: float = 0.0
    "what a cosine of 1 between an image's prompt weights and the mean of a task adds to that task's log probability"
    selections: Mapping[str, np.ndarray] | None = None
    "input of the prompted graph -> float32 (T, L, K); None: not recorded, or a learner without selection"

    @classmethod
    def of(cls, bundle: Bundle) -> Confidence:
        """Read it from a bundle. Raises: InputError for a file or an entry that is not what `export` writes."""
        manifest = bundle.manifest
        found, name = manifest.confidence, manifest.selections
        if found is None:
            return cls(bundle.tasks)
        try:
            temperature = _number(found["temperature"])
            if temperature <= 0:
                raise ValueError(f"a temperature of {temperature}")
            return cls(
                bundle.tasks,
                temperature,
                _number(found["unknown"]["below"]),
                _number(found["task"]["scale"]),
                None if name is None else _read(bundle, name),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{bundle.path}: what the bundle says about confidence is not understood",
                got=f"{type(error).__name__}: {error}",
                fix="export the bundle again",
            ) from error

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Softmax of logits (B, C) at the fitted temperature: float64 (B, C)."""
        return np.exp(_log_softmax(logits.astype(np.float64) / self.temperature))

    def unknown(self, logits: np.ndarray) -> np.ndarray | None:
        """bool (B,): the image looks like none of the classes; None where no threshold was fitted."""
        return None if self.unknown_below is None else energy(logits) < self.unknown_below

    def posterior(self, logits: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """p(task | image), float64 (B, T): the calibrated probabilities of a task's classes, and the prompts it called.

        weights: prompt_weights (B, L, K) as the query gave them; None where they come from the caller and say nothing.
        """
        score = task_scores(logits.astype(np.float64) / self.temperature, self.tasks)
        if weights is not None and self.task_scale and self.selections is not None:
            score = score + self.task_scale * cosines(weights, self.selections[WEIGHTS])
        return np.exp(_log_softmax(score))

    def selection(self, task: int) -> dict[str, np.ndarray]:
        """What the images of a task select on average: input of the prompted graph -> float32 (L, K).

        Raises: InputError for a task that is not there, or a bundle without recorded selections.
        """
        if not 0 <= task < len(self.tasks):
            expected = f"tasks 1 to {len(self.tasks)} (indices 0 to {len(self.tasks) - 1})"
            raise InputError("the bundle has no such task", got=f"task {task + 1} (index {task})", expected=expected)
        if self.selections is None:
            raise InputError("the bundle has no recorded selections", fix="export it again, or give the weights")
        return {name: array[task] for name, array in self.selections.items()}


def fit(
    logits: np.ndarray, labels: np.ndarray, tasks: Sequence[Sequence[int]], weights: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fit on N images that training has not seen.

    Args:
        logits: float (N, C). labels: int (N,). tasks: classes of each.
        weights: input of the prompted graph -> float32 (N, L, K); empty for a learner without selection.

    Returns: the manifest's "confidence", and the selections by name, float32 (T, L, K).

    Raises: InputError for a task without images.
    """
    task_of = np.empty(logits.shape[1], np.int64)
    for index, classes in enumerate(tasks):
        task_of[list(classes)] = index
    truth = task_of[labels]
    counts = np.bincount(truth, minlength=len(tasks))
    if not counts.all():
        raise InputError(
            "a task without images", got=f"task {int(counts.argmin()) + 1}", expected="images of every task"
        )
    wide = logits.astype(np.float64)
    temperature = 1 / _minimise(lambda s: _nll(wide * s, labels), 1 / RANGE[1], 1 / RANGE[0])
    classes_say = task_scores(wide / temperature, tasks)
    selections = {name: _means(array, truth, len(tasks)) for name, array in weights.items()}
    scale, held, both = 0.0, np.arange(len(truth)), classes_say
    if WEIGHTS in weights and counts.min() > 1:
        # The scale is fitted on images that the means have not seen: every second one of each task.
        order = np.argsort(truth, kind="stable")
        first, held = order[::2], order[1::2]
        near = cosines(weights[WEIGHTS], _means(weights[WEIGHTS][first], truth[first], len(tasks)))
        scale = _minimise(lambda s: _nll(classes_say[held] + s * near[held], truth[held]), 0.0, SCALE)
        both = classes_say + scale * near
    document = {
        "images": len(labels),
        "images_per_task": counts.tolist(),
        "temperature": temperature,
        "nll": {"before": _nll(wide, labels), "after": _nll(wide / temperature, labels)},
        "unknown": {
            "score": "logsumexp of the logits",
            "below": float(np.quantile(energy(logits), SHARE)),
            "share": SHARE,
        },
        "task": {
            "scale": scale,
            "accuracy": 100.0 * float((both.argmax(1) == truth)[held].mean()),
            "accuracy_by_classes": 100.0 * float((classes_say.argmax(1) == truth)[held].mean()),
        },
    }
    return document, selections


def pack_selections(selections: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of the file SELECTIONS, see artefacts.layout."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **selections)  # type: ignore[arg-type]
    return stream.getvalue()


def energy(logits: np.ndarray) -> np.ndarray:
    """logsumexp of logits (B, C): (B,), large for what the student knows (the negative of the paper's energy)."""
    top = logits.max(axis=1)
    return np.asarray(top + np.log(np.exp(logits.astype(np.float64) - top[:, None]).sum(axis=1)))


def task_scores(logits: np.ndarray, tasks: Sequence[Sequence[int]]) -> np.ndarray:
    """Log probability of each task's classes together, under logits (B, C): (B, T)."""
    return np.stack([energy(logits[:, list(classes)]) for classes in tasks], axis=1) - energy(logits)[:, None]


def cosines(weights: np.ndarray, means: np.ndarray) -> np.ndarray:
    """(B, L, K), (T, L, K) -> (B, T), the weights of all blocks taken as one vector."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (weights, means))
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    return np.asarray((a @ b.T) / np.maximum(lengths, 1e-12))


def _means(weights: np.ndarray, truth: np.ndarray, tasks: int) -> np.ndarray:
    return np.stack([weights[truth == task].mean(axis=0, dtype=np.float64) for task in range(tasks)]).astype(np.float32)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores - energy(scores)[:, None])


def _nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log likelihood."""
    return float((energy(logits) - logits[np.arange(len(labels)), labels]).mean())


def _minimise(loss: Callable[[float], float], low: float, high: float) -> float:
    """Golden section search: where a function of one valley is lowest."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    for _ in range(STEPS):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return (low + high) / 2


def _read(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    """Raises: ValueError, InputError."""
    shapes = dict(bundle.signature().outputs)
    if "prompted" in bundle.manifest.graphs:
        shapes |= bundle.signature("prompted").inputs
    known = {n: (len(bundle.tasks), *shape[1:]) for n, shape in shapes.items() if len(shape) == 3}
    selections = read_npz(bundle.read(name), most=sum(4 * math.prod(shape) for shape in known.values()))
    for key, array in selections.items():
        if array.dtype != np.float32 or array.shape != known.get(key):
            raise ValueError(f"{name}: {key} is {array.dtype} {array.shape}, expected float32 {known.get(key)}")
    if WEIGHTS not in selections:
        raise ValueError(f"{name}: no {WEIGHTS}")
    return selections


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)
