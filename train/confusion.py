"""Which classes a student takes for which: counts that say more than an average and fit into metrics.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .batches import TaskImages
from .devices import Devices
from .evaluate import answers
from .picture_choice import PictureChoice

WHOLE = 30
"classes up to which the whole matrix is kept"
PAIRS = 20
"most confused pairs that are kept"


def confusion(answers: Sequence[tuple[np.ndarray, np.ndarray]], classes: int) -> dict[str, Any]:
    """Counts over (labels, predicted) pairs of int (N,) arrays, both positions of `classes` learnt classes.

    Returns: {"images": [C], "right": [C], "pairs": [[true, predicted, images]], "matrix": [[...]] or None}: images of
        each class, how many of them were named rightly, the pairs that were confused most often, and for up to WHOLE
        classes the images of each class (row) by answer (column).
    """
    counts = np.zeros((classes, classes), np.int64)
    for labels, predicted in answers:
        np.add.at(counts, (labels, predicted), 1)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(i // classes), int(i % classes)) for i in order]
    return {
        "images": counts.sum(axis=1).tolist(),
        "right": np.diag(counts).tolist(),
        "pairs": [[true, answer, int(wrong[true, answer])] for true, answer in pairs if wrong[true, answer]],
        "matrix": counts.tolist() if classes <= WHOLE else None,
    }


class Answered:
    """Validation images that are handed on; what a model answers to each is remembered on the way."""

    def __init__(self, images: Iterable[TaskImages], name: str, classes: int, devices: Devices) -> None:
        """name: of the model. classes: that are learnt. The processes of a Devices share the work."""
        self.images, self.name, self.classes, self.devices = images, name, classes, devices
        self.found: list[tuple[np.ndarray, np.ndarray]] = []
        self.choice = PictureChoice()

    def __iter__(self) -> Iterator[TaskImages]:
        for images in self.images:
            predicted, probability, of_true = answers(images, self.name, self.classes, self.devices)
            self.found.append((images.labels, predicted))
            self.choice.add(images.split, images.read, predicted, probability, of_true)
            yield images

    def confusion(self) -> dict[str, Any]:
        """Confusion counts over all images that have been handed on; see the function `confusion`."""
        return confusion(self.found, self.classes)

    def pictures(self, seed: int) -> list[dict[str, Any]]:
        """Some of the images that have been handed on, for the report; see picture_choice.PictureChoice."""
        return self.choice.chosen(seed)
