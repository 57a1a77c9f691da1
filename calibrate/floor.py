"""Below which likeness to fp32 a precision is not recommended, however fast it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .latency import TimedCandidate
from .measure import average_drop
from .paired import Paired

AGREEMENT = 97.0
"% of the images with the same answer as fp32. Good 8 bits keep 99.1 %, bf16 98.7 to 99.0 (photographs, 2026-11-21)"
DROP = 1.0
"points of accuracy, where chance does not explain the loss"
IMAGES = 256
"that a precision answers on its backend before it is recommended"
GAIN = 0.05
"share of fp32's time that another precision has to save: less is noise, and no reason to answer otherwise"
FEW = 100
"images below which an agreement of 97 % is said to be a guess, and the answers have to be close as well"
ERROR = 0.25
"""error of the logits of few images, see spread_error. Four images estimate it as well as 48 do, while four answers out
of four say little: 8 bits that kept all answers to 48 images had 0.01 to 0.20, those that lost 4, 33 and 44 points of
accuracy 0.41, 0.92 and 0.89, and the first of these agreed on four out of four (a student with wild channels,
2026-11-28)"""


def shortfall(
    expected: np.ndarray, answers: np.ndarray, labels: np.ndarray | None, tasks: Sequence[Sequence[int]]
) -> str | None:
    """Why a graph with these answers, logits (N, C), is not to be recommended beside fp32's; None: it may be.

    labels: class of each image (N,); None: only the answers are compared.
    """
    if not np.isfinite(answers).all():
        return "its answers are not finite"
    said, wanted = answers.argmax(1), expected.argmax(1)
    agreement = 100.0 * float((said == wanted).mean())
    if agreement < AGREEMENT:
        return (
            f"the same answer as fp32 on {agreement:.1f} % of {len(said)} images, at least {AGREEMENT:.0f} % are asked"
        )
    if len(said) < FEW and (error := spread_error(expected, answers)) > ERROR:
        return (
            f"its logits are off by {100 * error:.0f} % of their spread, at most {100 * ERROR:.0f} % may be where only "
            f"{len(said)} images are compared"
        )
    if labels is not None and len(labels):
        drop = average_drop(wanted == labels, said == labels, labels, tasks)
        if drop > DROP and Paired.of(wanted == labels, said == labels).significant:
            return f"{drop:.1f} points of accuracy are lost, at most {DROP:g} may be"
    return None


def spread_error(expected: np.ndarray, answers: np.ndarray) -> float:
    """Root mean square error of logits (N, C), in units of the standard deviation over classes of those expected.

    What is added to all logits of an image counts for nothing: it changes no answer.
    """
    wanted, got = (x - x.mean(axis=1, keepdims=True) for x in (expected, answers))
    return float(np.linalg.norm(got - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))


def some_of(images: int) -> np.ndarray:
    """Which of so many images every candidate answers: int64, evenly spread."""
    return np.linspace(0, images - 1, min(IMAGES, images)).round().astype(np.int64)


def recommend(
    timed: Sequence[TimedCandidate], expected: np.ndarray, labels: np.ndarray | None, tasks: Sequence[Sequence[int]]
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The fastest backend and precision that answer like fp32, and those that were faster, with what is against them.

    One that the self-test refuses would be no use: a device asks it of whatever it installs. Another precision than
    fp32 has to be faster by GAIN: the time of a turn tells no less apart.

    Args:
        timed: of `latency.time_candidates`. expected: logits (N, C) of fp32 about the same images. labels: (N,).
    """
    refused: list[dict[str, str]] = []
    reasons = [(one, shortfall(expected, one.answers, labels, tasks) or one.failed) for one in timed]
    exact = min((one.ratio for one, reason in reasons if one.precision == "fp32" and reason is None), default=np.inf)
    for one, reason in sorted(reasons, key=lambda pair: pair[0].ratio):
        chosen = {"backend": one.backend, "precision": one.precision}
        if reason is None and one.precision != "fp32" and one.ratio > (1 - GAIN) * exact:
            saved = 100 * (1 - one.ratio / exact)
            reason = f"it saves {saved:.1f} % of fp32's time, at least {100 * GAIN:.0f} % are asked"
        if reason is None:
            return chosen, refused
        refused.append({**chosen, "reason": reason})
    return {"backend": "onnxruntime", "precision": "fp32"}, refused
