"""The frozen baseline: closed-form heads on the bare student backbone, on the same images. Seconds, nothing learnt.

It stands beside every result: prompts and distillation have to beat it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..class_statistics import ClassStatistics
from ..heads import CLOSED_FORM, feature_map
from ..heartbeat import at
from .backbone import Backbone
from .batches import TaskImages
from .closed_form import StatisticsKeeper, feature_parts
from .run import Run
from .student import run_block
from .tokens import pooled

HEADS = ("slda", "ranpac")
CHUNK = 128


class FrozenBaseline:
    """Learns the classes of a run task by task, as the run does, and answers for its validation images."""

    def __init__(self, backbone: Backbone, random_features: int, keeper: StatisticsKeeper) -> None:
        """random_features: of the head `ranpac`."""
        self.backbone, self.keeper = backbone, keeper
        parts = feature_parts(kd_token=False)
        self.maps = {h: feature_map(h, parts, len(parts) * backbone.width, random_features) for h in HEADS}

    @property
    def sides(self) -> list[str]:
        """Names under which the statistics of the frozen student stand among those of the run."""
        return [f"frozen-{h}" for h in HEADS]

    @torch.no_grad()
    def features(self, images: TaskImages) -> np.ndarray:
        """Class token and pooled patches, as heads read them: float32 (N, 5 D)."""
        vit, parts = self.backbone.model, []
        for start in range(0, len(images), CHUNK):
            at(f"frozen baseline: features of the pictures: {start:,} of {len(images):,}")
            tokens = images.bare_tokens("student", np.arange(start, min(start + CHUNK, len(images))))
            for i, block in enumerate(vit.blocks):
                last = i == len(vit.blocks) - 1
                # Of the last block: in front of it, as students do.
                patches = pooled(vit, vit.norm(tokens[:, int(vit.num_prefix_tokens) :]))
                tokens = run_block(block, tokens, keep=[0] if last else None)
            parts.append(torch.cat([vit.norm(tokens)[:, 0], patches], dim=1).float().cpu())
        return torch.cat(parts).numpy()

    def learn(self, task: int, images: TaskImages, first: int, classes: list[str]) -> None:
        """The statistics of a task, 0-based. first: label of its first class; classes: names in the order of labels."""
        own = images.labels >= first
        x, labels = self.features(images)[own], images.labels[own] - first
        for head, map in self.maps.items():
            part = ClassStatistics.of(map, x, labels, classes)
            self.keeper.add(f"frozen-{head}", task + 1, part)

    def measure(self, val: Iterable[TaskImages]) -> dict[str, Any]:
        """{"head", "average_accuracy", "heads": {...}}: in %, mean over tasks, of the better of both heads."""
        return self.compare([(self.features(images), images.labels) for images in val])

    def compare(self, measured: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """The same from features (N, 5 D) and labels int (N,) of each task's images."""
        found: dict[str, float] = {}
        for head, map in self.maps.items():
            made = CLOSED_FORM[head][1](self.keeper.totals[f"frozen-{head}"])
            right = []
            for x, labels in measured:
                answers = (map.apply(x) @ made.weight.T + made.bias).argmax(axis=1)
                right.append(100.0 * float((answers == labels).mean()))
            found[head] = sum(right) / len(right)
        best = max(found, key=lambda h: found[h])
        return {"head": best, "average_accuracy": found[best], "heads": found}


def baseline_of(run: Run) -> FrozenBaseline | None:
    """The frozen baseline as a finished run has learnt it; None for a run that has kept none.

    Raises: InputError where what it kept is damaged.
    """
    keeper, tasks = StatisticsKeeper(run.path, write=False), len(run.metrics.tasks)
    bare = replace(run.backbone, model=run.student.pretrained)  # a whole network has learnt: not that one
    baseline = FrozenBaseline(bare, run.config.random_features, keeper)
    if run.metrics.baseline is None or not keeper.has(baseline.sides, tasks):
        return None
    keeper.restore(baseline.sides, tasks)
    return baseline
