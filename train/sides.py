"""Teacher and student of a run: what each is, and what its training has measured so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .backbone import Backbone
from .batches import Pipeline
from .metrics import AccuracyMatrix
from .student import PromptedViT
from .teachers import TaughtTask

SIDES = ("teacher", "student")
"in the order in which they learn a task"


@dataclass
class TrainedSide:
    """Teacher or student while it is trained: the model and what its record says."""

    name: str
    backbone: Backbone
    pipeline: Pipeline
    matrix: AccuracyMatrix
    losses: list[list[float]] = field(default_factory=list)
    "of each task: the mean of each epoch"
    seconds: list[float] = field(default_factory=list)
    "of each task"
    trained_images: int = 0
    "of all epochs"

    @property
    def model(self) -> PromptedViT:
        """The module that learns."""
        return self.pipeline.model

    @property
    def images_per_second(self) -> float:
        """Images per second of training, all epochs together."""
        return self.trained_images / max(1e-9, sum(self.seconds))

    def begin_task(self) -> None:
        """Begin the record of a task of which nothing is trained yet."""
        self.losses.append([])
        self.seconds.append(0.0)

    def epoch_done(self, loss: float, seconds: float, images: int) -> None:
        """Add one more epoch to the record of the task."""
        self.losses[-1].append(loss)
        self.seconds[-1] += seconds
        self.trained_images += images

    def take_over(self, task: int, taught: TaughtTask) -> None:
        """What another run has trained in a task, in place of what was begun here."""
        self.model.load_state_dict(taught.state)
        for begun in self.losses[task:]:  # here, before the stop; another run has finished it since
            self.trained_images -= len(begun) * taught.images // max(1, len(taught.losses))
        del self.losses[task:], self.seconds[task:]
        self.losses.append(taught.losses)
        self.seconds.append(taught.seconds)
        self.trained_images += taught.images

    def summary(self) -> dict[str, Any]:
        """What metrics.json says of this side."""
        return {
            **self.matrix.summary(),
            "seconds": self.seconds,
            "loss": self.losses,
            "images_per_second": {"train": self.images_per_second},
        }


def state_of(sides: Mapping[str, TrainedSide]) -> dict[str, Any]:
    """What a checkpoint keeps of the sides; `restore` takes it over again."""
    return {
        "models": {name: side.model.state_dict() for name, side in sides.items()},
        "backbones": {name: side.backbone.identity for name, side in sides.items()},
        "matrices": {name: side.matrix.rows for name, side in sides.items()},
        "losses": {name: side.losses for name, side in sides.items()},
        "seconds": {name: side.seconds for name, side in sides.items()},
        "trained_images": {name: side.trained_images for name, side in sides.items()},
    }


def restore(sides: Mapping[str, TrainedSide], state: Mapping[str, Any], tasks: int) -> None:
    """Take over what `state_of` gave. tasks: of the whole run."""
    for name, side in sides.items():
        side.model.load_state_dict(state["models"][name])
        side.matrix = AccuracyMatrix(tasks, state["matrices"][name])
        side.losses, side.seconds = state["losses"][name], state["seconds"][name]
        side.trained_images = state["trained_images"][name]
