"""Class-incremental scenario: the classes in learned order, cut into tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data import Dataset, Split
from ..errors import InputError


@dataclass(frozen=True)
class Scenario:
    """Tasks with disjoint classes. Class indices are positions in `order`, so task t's classes are consecutive."""

    order: tuple[int, ...]
    "dataset class index at each learned position"
    tasks: tuple[tuple[int, ...], ...]
    "learned positions of each task"

    def classes_of(self, dataset: Dataset) -> list[str]:
        """Names of the classes of a data set, in the order in which they are learnt."""
        return [dataset.classes[c] for c in self.order]

    def split(self, split: Split, task: int) -> Split:
        """The images of a task, labelled with learned positions."""
        # The source may have classes that were never learnt: they are in no task.
        position = np.full(max(self.order) + 1, -1, dtype=np.int64)
        position[list(self.order)] = np.arange(len(self.order))
        part = split.of_classes([self.order[p] for p in self.tasks[task]])
        return Split(part.items, position[part.labels])

    def seen(self, task: int) -> int:
        """Number of classes of tasks 0 to `task` together."""
        return self.tasks[task][-1] + 1


def make_scenario(classes: Sequence[str], tasks: int, seed: int, shuffle: bool = True) -> Scenario:
    """Cut the classes into `tasks` parts; where it does not divide, the first parts get one more.

    The order is drawn by the seed, so that seeds differ in more than their initial values (the authors' code keeps the
    order of the folder names: shuffle=False). Raises: InputError for fewer classes than tasks.
    """
    count = len(classes)
    if not 1 <= tasks <= count:
        raise InputError(
            "the classes cannot be cut into that many tasks",
            got=f"{count} classes, {tasks} tasks",
            expected=f"1 to {count} tasks",
            fix="give a smaller --tasks or more class folders",
        )
    order = np.random.default_rng([seed, 0xC1A55]).permutation(count) if shuffle else np.arange(count)
    parts = np.array_split(np.arange(count), tasks)
    return Scenario(tuple(order.tolist()), tuple(tuple(p.tolist()) for p in parts))
