"""A head in closed form as a module of the student, and the statistics that it is made from, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..class_statistics import ClassStatistics, FeatureMap
from ..heads import CLOSED_FORM, RANDOM_FEATURES, LinearMap, feature_map
from .aligned import align


def statistics_heads() -> tuple[str, ...]:
    """Heads that are made from class statistics; `aligned` learns a linear head on features drawn from them."""
    return (*CLOSED_FORM, "aligned")


def feature_parts(kd_token: bool) -> tuple[str, ...]:
    """Names of the parts that the features of a student are joined from, in order; see FeatureMap."""
    tokens = ("class", "kd") if kd_token else ("class",)
    return (*tokens, "patches", "vertical", "horizontal", "diagonal")


class StatisticsHead(nn.Module):
    """Logits of features by a linear map that was made from class statistics; nothing here learns by gradient."""

    def __init__(
        self,
        kind: str,
        width: int,
        kd_token: bool,
        classes: int,
        random_features: int = RANDOM_FEATURES,
        token_weight: float = 1.0,
    ) -> None:
        """width: of a token, D; the features are five or six times as wide. classes: of all tasks, C.

        token_weight: of ranpac, where there are two tokens (`kd_token`); see FeatureMap.
        """
        super().__init__()
        parts = feature_parts(kd_token)
        self.kind, self.classes = kind, classes
        weight = token_weight if kd_token else 1.0
        self.map: FeatureMap = feature_map(kind, parts, width * len(parts), random_features, weight)
        self.weight: Tensor
        self.bias: Tensor
        self.projection: Tensor | None
        self.register_buffer("weight", torch.zeros(classes, self.map.features))
        self.register_buffer("bias", torch.zeros(classes))
        projection = self.map.projection()
        # Made from its seed again: it is not saved with the run.
        self.register_buffer(
            "projection", torch.from_numpy(projection) if projection is not None else None, persistent=False
        )

    def set(self, made: LinearMap) -> None:
        """Replace the head by one that was made for the first classes; it needs no fewer rows than that one."""
        count = len(made.weight)
        self.weight.zero_()
        self.bias.zero_()
        self.weight[:count] = torch.from_numpy(made.weight).to(self.weight)
        self.bias[:count] = torch.from_numpy(made.bias).to(self.bias)

    def mapped(self, x: Tensor) -> Tensor:
        """Features of the network (B, D) -> what the linear map reads of them (B, F)."""
        if self.map.kind == "unit":
            return F.normalize(x, dim=1, eps=1e-12)
        return x if self.projection is None else F.relu(x @ self.projection)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the network (B, D) -> logits (B, C)."""
        return F.linear(self.mapped(x.float()), self.weight, self.bias)


def make(kind: str, statistics: ClassStatistics, seed: int) -> LinearMap:
    """The head of a kind from statistics. seed: of the features that `aligned` draws."""
    return align(statistics, seed) if kind == "aligned" else CLOSED_FORM[kind][1](statistics)


class StatisticsKeeper:
    """The statistics of a run, all tasks so far merged: `statistics/<side>-<tasks>.npz` in the RUN folder.

    The file before the last one stays until the next task, so that a run that was killed between a file and its
    checkpoint finds the one that its checkpoint belongs to.
    """

    def __init__(self, run: Path, write: bool) -> None:
        """write: whether this process writes files."""
        self.folder, self.write = run / "statistics", write
        self.totals: dict[str, ClassStatistics] = {}

    def add(self, side: str, tasks: int, part: ClassStatistics) -> None:
        """The statistics of a task, the `tasks`-th."""
        self.totals[side] = self.totals[side] + part if side in self.totals else part
        if self.write:
            self.folder.mkdir(exist_ok=True)
            run = self.folder.parent
            self.totals[side].save(statistics_file(run, side, tasks))
            statistics_file(run, side, tasks - 2).unlink(missing_ok=True)

    def restore(self, sides: Sequence[str], tasks: int, run: Path | None = None) -> None:
        """Read those of the first `tasks` tasks; of the run that this one extends where `run` is given.

        Raises: InputError where one is missing or damaged.
        """
        folder = run or self.folder.parent
        self.totals |= {side: load_statistics(folder, side, tasks) for side in sides if tasks}

    def has(self, sides: Sequence[str], tasks: int, run: Path | None = None) -> bool:
        """Whether `restore` would find files; runs of earlier versions, and their followers, have none."""
        folder = run or self.folder.parent
        return not tasks or any(statistics_file(folder, side, tasks).exists() for side in sides)

    def finish(self, tasks: int) -> None:
        """Remove the statistics of single tasks; only the file of all `tasks` stays."""
        for side in self.totals if self.write else ():
            statistics_file(self.folder.parent, side, tasks - 1).unlink(missing_ok=True)


def statistics_file(run: Path, side: str, tasks: int) -> Path:
    """Where a run keeps the statistics of its first `tasks` tasks; side: student, teacher, frozen-slda ..."""
    return run / "statistics" / f"{side}-{tasks}.npz"


def load_statistics(run: Path, side: str, tasks: int) -> ClassStatistics:
    """The statistics of the first `tasks` tasks of a run. Raises: InputError where they are missing or damaged."""
    return ClassStatistics.load(statistics_file(run, side, tasks))


def as_numpy(parts: Sequence[Tensor]) -> np.ndarray:
    """Join chunks of features to one float32 (N, D)."""
    return torch.cat(list(parts)).float().cpu().numpy()
