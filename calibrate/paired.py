"""Whether a loss of accuracy is one, or chance: an exact test on the answers to the same images.

Only images that one of both graphs has right and the other wrong say anything. Without a loss each of them falls to
either side like a coin: the sign test, as McNemar (Psychometrika 12, 1947) has it, exact instead of by chi squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.05
"a loss that chance explains less often than this is one"
FEWEST = math.ceil(math.log2(1 / LEVEL))
"answers lost, none won, from which a loss is more than chance"


@dataclass(frozen=True)
class Paired:
    """Answers of two graphs to the same images."""

    images: int
    lost: int
    "right before, wrong after"
    won: int
    "wrong before, right after"

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray) -> Paired:
        """From whether each answer is right: bool (N,), of the first graph and of the second."""
        return cls(len(before), int((before & ~after).sum()), int((after & ~before).sum()))

    @property
    def drop(self) -> float:
        """Accuracy that 8 bits lose, in points."""
        return 100.0 * (self.lost - self.won) / self.images

    @property
    def p(self) -> float:
        """How often chance alone loses so many of the answers that differ, or more."""
        differing = self.lost + self.won
        return sum(math.comb(differing, k) for k in range(self.lost, differing + 1)) / 2**differing

    @property
    def significant(self) -> bool:
        """Whether more accuracy is lost than chance explains."""
        return self.p < LEVEL

    @property
    def smallest(self) -> float:
        """The smallest loss, in points, that so many images can tell from chance."""
        return 100.0 * FEWEST / self.images if self.images else math.inf

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return {**vars(self), "p": self.p}
