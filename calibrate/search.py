"""Which layers stay in float so that no task loses more than it may."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .measure import Measured, compare

Answers = Callable[[Collection[str]], np.ndarray]
"units that stay in float -> logits (N, C) of the 8-bit graph on the images of a gate or of a sensitivity"


class GateError(RuntimeError):
    """8 bits cost more than they may, whatever stays in float."""


@dataclass(frozen=True)
class Gate:
    """What 8 bits may cost at most."""

    max_drop: float
    "points of accuracy, of every task with images and of their average"

    def failures(self, before: Measured, after: Measured) -> list[str]:
        """A line for each that loses more."""
        drop = compare(before, after)["drop"]
        tasks = [
            f"task {t + 1} loses {d:.2f} points"
            for t, d in enumerate(drop["per_task"])
            if d is not None and d > self.max_drop
        ]
        if drop["average"] > self.max_drop:
            tasks.append(f"the average loses {drop['average']:.2f} points")
        return tasks


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


def refusal(flavour: str, max_drop: float, failures: Sequence[str], ranking: dict[str, float]) -> GateError:
    """The gate's answer when nothing may be searched."""
    worst: list[Any] = list(ranking.items())[:5]
    layers = ", ".join(f"{unit} ({error:.1e})" for unit, error in worst)
    return GateError(
        f"{flavour}: more than {max_drop} points are lost: {'; '.join(failures)}; most sensitive layers (mean squared "
        f"change of the logits): {layers}; nothing was written. Allow --search, or a larger --max-drop"
    )
