"""Which layers stay in float so that no task loses more than it may."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GateError
from .paired import Paired

Answers = Callable[[Collection[str]], np.ndarray]
"units that stay in float -> logits (N, C) of the 8-bit graph on the images of a gate or of a sensitivity"


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one 8-bit graph."""

    failures: list[str]
    "a line for each task, or the average, that loses more than it may, by more than chance"
    unsure: list[str]
    "a line for each that the images cannot decide"

    @property
    def name(self) -> str:
        """The verdict in a word: failed, not decided or passed."""
        return "failed" if self.failures else "not decided" if self.unsure else "passed"


@dataclass(frozen=True)
class Gate:
    """How much accuracy 8 bits may cost at most."""

    max_drop: float
    "points of accuracy, of every task with images and of their average"

    def judge(
        self, before: np.ndarray, after: np.ndarray, labels: np.ndarray, tasks: Sequence[Sequence[int]]
    ) -> Verdict:
        """Compare logits (N, C) in fp32 and in 8 bits on the same images, with their labels (N,).

        A loss above the limit fails when chance does not explain it (`paired`). Where it may be chance, and where there
        are so few images that a loss as large as the limit would be, nothing is decided.
        """
        was, now = before.argmax(1) == labels, after.argmax(1) == labels
        parts = [(f"task {t + 1}", mine) for t, task in enumerate(tasks) if (mine := np.isin(labels, task)).any()]
        rows = [(name, Paired.of(was[mine], now[mine])) for name, mine in parts]
        drops = [pair.drop for _, pair in rows]
        rows.append(("the average", Paired.of(was, now)))
        failures, unsure = [], []
        for (name, pair), drop in zip(rows, [*drops, float(np.mean(drops))], strict=True):
            if drop > self.max_drop and pair.significant:
                failures.append(f"{name} loses {drop:.2f} points")
            elif drop > self.max_drop:
                changed = f"{pair.lost} answers lost, {pair.won} won of {pair.images}"
                unsure.append(f"{name} loses {drop:.2f} points, but that may be chance ({changed}, p = {pair.p:.2f})")
            elif pair.smallest > self.max_drop:
                unsure.append(f"{name}: {pair.images} images show no loss below {pair.smallest:.1f} points")
        return Verdict(failures, unsure)


def sensitivities(answers: Answers, units: Sequence[str], expected: np.ndarray) -> dict[str, float]:
    """Unit -> mean squared change of the logits when it alone is in 8 bits; the most sensitive first.

    expected: the logits (N, C) in fp32.
    """
    alone = {u: float(((answers([o for o in units if o != u]) - expected) ** 2).mean()) for u in units}
    return dict(sorted(alone.items(), key=lambda item: -item[1]))


def search(failing: Callable[[Collection[str]], list[str]], order: Sequence[str]) -> list[str]:
    """The fewest units, most sensitive first, that have to stay in float.

    failing: units in float -> what fails then. Halving: that fewer units in 8 bits lose less is assumed, the result
    itself is always tried. Raises: GateError when it fails with all but one in float.
    """
    low, high = 0, len(order)  # low fails, high is not tried: it would be fp32
    while high - low > 1:
        middle = (low + high) // 2
        if failing(order[:middle]):
            low = middle
        else:
            high = middle
    if high == len(order):
        failures = failing(order[: len(order) - 1])
        raise GateError(
            f"8 bits fail the gate even with one layer only: {'; '.join(failures)}; most sensitive: "
            f"{', '.join(order[:5])}; nothing was written"
        )
    return list(order[:high])


def refusal(scheme: str, max_drop: float, failures: Sequence[str], ranking: dict[str, float]) -> GateError:
    """The error of a gate that is not passed where nothing may be searched."""
    worst: list[Any] = list(ranking.items())[:5]
    layers = ", ".join(f"{unit} ({error:.1e})" for unit, error in worst)
    return GateError(
        f"{scheme}: more than {max_drop} points are lost: {'; '.join(failures)}; most sensitive layers (mean squared "
        f"change of the logits): {layers}; nothing was written. Allow --search, or a larger --max-drop"
    )
