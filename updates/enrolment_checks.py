"""Is a class learnt from these pictures any good, and what does it cost the others? From features, without images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..class_statistics import ClassStatistics
from ..errors import GateError, InputError
from ..heads import CLOSED_FORM, RIDGE_SCALE, LinearMap

FEWEST = 3
"pictures of a class"
DUPLICATE = 0.98
"""cosine of the features of two pictures above which they are one picture twice. Measured with `builtin:student`: the
same photograph written again as JPEG of quality 90 has 0.975 to 0.995, two photographs of one class 0.80 at most, two
digits of 8 x 8 pixels 0.973 at most (4 x 435 and 435 pairs, 2026-11-27)."""
ALIKE = 0.5
"share of the pictures that one other class may take, each judged by the others, before they are called that class's"
ENOUGH = 0.7
"""share of unseen pictures that is recognised, at the lower end of the 95 % interval, from which on there are enough:
10 of 10, 19 of 20, 26 of 30"""


def check_count(name: str, count: int, held: int, fewest: int = FEWEST) -> None:
    """Raises: InputError for a class of too few pictures. held: those that it has already."""
    if count + held < fewest or count == 0:
        raise InputError(
            f"class {name!r}: too few pictures",
            got=count + held,
            expected=f"{fewest} or more, better 10",
            fix="take more, from other sides and in other light",
        )


def check_duplicates(x: np.ndarray, pictures: Sequence[str], known: np.ndarray) -> None:
    """Raises: InputError where two pictures are one.

    Args:
        x: float (n, D) features of the pictures. known: float (m, D), of those that the class was given before.
    """
    unit = [v / np.maximum(np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True), 1e-12) for v in (x, known)]
    cosines = unit[0] @ np.concatenate(unit).T
    pairs = [(i, j) for i, j in np.argwhere(cosines > DUPLICATE) if j > i]
    if pairs:
        names = [*pictures, *["a picture that was enrolled before"] * len(known)]
        shown = "; ".join(f"{names[i]} and {names[j]} ({cosines[i, j]:.4f})" for i, j in pairs[:3])
        raise InputError(
            f"{len(pairs)} pair(s) of pictures are nearly the same: they teach nothing new",
            got=shown,
            expected=f"pictures whose features have a cosine of {DUPLICATE} or less",
            fix="leave one of each pair out; move the camera or the thing between two pictures",
        )


def left_out(
    kind: str,
    total: ClassStatistics,
    head: LinearMap,
    h: np.ndarray,
    name: str,
    leverages: np.ndarray,
    target: float = 1.0,
) -> list[str]:
    """What each picture of a class is taken for by the head that the other pictures make.

    For ranpac in closed form, the ridge being that of all pictures; for the others by making the head again.

    Args:
        kind: of the head. total, head: with the pictures. h: float64 (n, F), what the head reads of them.
        leverages: for ranpac: float64 (n,), see heads.ridge_regression; of a picture that counts w times, w times that.
        target: for ranpac: what the regression of the class was to give; of all others 1.
    """
    label = total.classes.index(name)
    if kind == "ranpac":
        # Of ridge regression: (f - y s) / (1 - s), s the leverage (Allen, "PRESS", Technometrics 1974).
        logits = h @ head.weight.T + head.bias
        logits[:, label] -= RIDGE_SCALE * target * leverages
        logits /= np.maximum(1 - leverages, 1e-9)[:, None]
    else:
        rows = []
        for x in h:
            one = ClassStatistics(total.map, (name,), np.array([1]), x[None], np.outer(x, x))
            made = CLOSED_FORM[kind][1](total - one)
            rows.append(x @ made.weight.T + made.bias)
        logits = np.stack(rows)
    return [total.classes[i] for i in logits.argmax(axis=1)]


def check_alike(name: str, taken_for: Sequence[str]) -> None:
    """Raises: InputError where most pictures of a class are taken for one other class."""
    other, count = next(iter(Counter(c for c in taken_for if c != name).most_common(1)), ("", 0))
    if count > ALIKE * len(taken_for):
        raise InputError(
            f"class {name!r}: its pictures look like the class {other!r}",
            got=f"{count} of {len(taken_for)} are taken for {other!r}, each judged by the others",
            expected=f"at most {int(ALIKE * len(taken_for))}",
            fix=f"if they are {other!r}, enrol them under that name; if not, take more pictures, closer and from "
            "other sides",
        )


def losses(
    before: ClassStatistics, old: LinearMap, after: ClassStatistics, new: LinearMap, logits: Sequence[np.ndarray]
) -> dict[str, Any]:
    """What the classes that were there lose.

    Args:
        before, old; after, new: statistics and head. logits: of both heads on the pictures of the self-test, (n, C).

    Returns: {"selftest": {"images", "changed", "drop"}, "means": {"classes", "recognised_before",
        "recognised_after", "drop"}}; drop in points.
    """
    answers = [[part.classes[i] for i in one.argmax(axis=1)] for part, one in zip((before, after), logits, strict=True)]
    changed = sum(a != b for a, b in zip(*answers, strict=True))
    means, count = before.means, len(before.classes)
    right = [int(((means @ h.weight.T + h.bias).argmax(axis=1) == np.arange(count)).sum()) for h in (old, new)]
    return {
        "selftest": {"images": len(logits[0]), "changed": changed, "drop": 100.0 * changed / max(1, len(logits[0]))},
        "means": {
            "classes": count,
            "recognised_before": right[0],
            "recognised_after": right[1],
            "drop": 100.0 * (right[0] - right[1]) / count,
        },
    }


def check_losses(name: str, found: dict[str, Any], max_drop: float) -> None:
    """Raises: GateError where the classes that were there lose more than `max_drop` points."""
    worst = max(("selftest", "means"), key=lambda kind: float(found[kind]["drop"]))
    if found[worst]["drop"] > max_drop:
        what = {"selftest": "pictures of the self-test answered as before", "means": "classes known by their mean"}
        raise GateError(
            f"class {name!r}: the classes that were there would lose too much",
            got=f"{found[worst]['drop']:.2f} points fewer {what[worst]}",
            expected=f"{max_drop:g} points or fewer",
            fix="take other pictures, or allow more with --max-drop",
        )


def enough(right: int, count: int) -> dict[str, Any]:
    """Are there enough pictures? {"enough", "accuracy" (%), "low", "high" (95 % interval, %), "sentence"}."""
    share, z = right / count, 1.96
    # Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    seen = f"{right} of {count} are recognised by what the others teach"
    if low >= ENOUGH:
        sentence = f"Enough pictures: {seen}."
    elif share >= ENOUGH:
        sentence = f"A few more pictures would make it sure: {seen}."
    else:
        sentence = f"Not enough pictures: only {seen}; take more, as different as what the camera will see."
    return {
        "enough": low >= ENOUGH,
        "accuracy": 100 * share,
        "low": 100 * low,
        "high": 100 * high,
        "sentence": sentence,
    }
