"""Which validation pictures a report shows, with what the student answered to them.

A run keeps a hash of each and its place among those of its class, neither the picture nor its name: the report looks
for it in the data source again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artefacts.run_record import PICTURE_KINDS, PICTURES_EACH
from ..splits import Split

ALIKE = 2
"of the surest mistakes: pictures of one class that were taken for the same other one"


@dataclass(frozen=True)
class _Answers:
    """The answers to one task's images."""

    split: Split
    read: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    of_true: np.ndarray


class PictureChoice:
    """Collects what a model answers to all validation images, then chooses some of them."""

    def __init__(self) -> None:
        self.tasks: list[_Answers] = []

    def add(
        self, split: Split, read: np.ndarray, predicted: np.ndarray, probability: np.ndarray, of_true: np.ndarray
    ) -> None:
        """The answers to a task's images.

        Args:
            split: the images, labelled with learned positions.
            read: int64 (N,), those of the split that could be read.
            predicted: int64 (N,), learned positions. probability: float (N,), of them. of_true: float (N,), of the
                right classes.
        """
        self.tasks.append(_Answers(split, read, predicted, probability.round(4), of_true.round(4)))

    def chosen(self, seed: int) -> list[dict[str, Any]]:
        """At most PICTURES_EACH of every kind, as artefacts.run_record.ExamplePicture has them.

        "wrong": the surest mistakes first, at most ALIKE of one class and one answer; "unsure": the least sure of the
        right answers; "drawn": by `seed` from all others.
        """
        if not self.tasks:
            return []
        task = np.concatenate([np.full(len(t.read), i) for i, t in enumerate(self.tasks)])
        place = np.concatenate([t.read for t in self.tasks])
        true = np.concatenate([t.split.labels[t.read] for t in self.tasks])
        predicted = np.concatenate([t.predicted for t in self.tasks])
        probability = np.concatenate([t.probability for t in self.tasks])
        of_true = np.concatenate([t.of_true for t in self.tasks])
        right = predicted == true

        wrong: list[int] = []
        alike: dict[tuple[int, int], int] = {}
        for i in np.flatnonzero(~right)[np.argsort(-probability[~right], kind="stable")]:
            pair = (int(true[i]), int(predicted[i]))
            alike[pair] = alike.get(pair, 0) + 1
            if alike[pair] <= ALIKE and len(wrong) < PICTURES_EACH:
                wrong.append(int(i))
        unsure = np.flatnonzero(right)[np.argsort(probability[right], kind="stable")][:PICTURES_EACH].tolist()
        others = np.setdiff1d(np.arange(len(true)), [*wrong, *unsure])
        drawn = np.random.default_rng([seed, 0x91C7]).permutation(others)[:PICTURES_EACH].tolist()
        found = []
        for kind, indices in zip(PICTURE_KINDS, (wrong, unsure, drawn), strict=True):
            for i in indices:
                split, at = self.tasks[task[i]].split, int(place[i])
                try:
                    digest = split.digest(at)
                except OSError:  # it was read, and is gone: there is nothing to show
                    continue
                found.append(
                    {
                        "kind": kind,
                        "true": int(true[i]),
                        "answer": int(predicted[i]),
                        "probability": float(f"{probability[i]:.4f}"),
                        "probability_of_true": float(f"{of_true[i]:.4f}"),
                        "place": int((split.labels[:at] == true[i]).sum()),
                        "sha256": digest,
                    }
                )
        return found
