"""The interface of a distiller: what it is told of a step, and the divergence most of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..learners import Learner
from ..student import PromptedViT, StudentOutput


@dataclass(frozen=True)
class DistillSpec:
    """Sizes and settings a distiller is built for."""

    alpha: float
    "share of the distillation term"
    tau: float
    "temperature"
    student_width: int
    "channels of a student token, D"
    student_depth: int
    "blocks of the student"
    student_grid: int
    "patches along a side of the student's image"
    teacher_width: int
    "channels of a teacher token, Dt; 0 without a teacher"
    teacher_depth: int
    "blocks of the teacher; 0 without a teacher"
    teacher_grid: int
    "patches along a side of the teacher's image; 0 without a teacher"
    classes: int
    "classes of all tasks, C"
    class_ranges: tuple[tuple[int, int], ...]
    "first and last + 1 learned class position of each task"
    seed: int
    "of initial values"
    compat: bool = False
    "as the CDL authors' code: ReviewKD's fusion, feature terms of two GPUs"
    exemplars: bool = False
    "whether images of earlier classes come with those of the task (M2KD)"
    pruned: str = "pretrained"
    "key of snapshots.PRUNED (M2KD)"

    @property
    def features(self) -> float:
        """Factor of a feature term. The CDL authors train on two GPUs and sum the replicas' means: 2."""
        return 2.0 if self.compat else 1.0


@dataclass(frozen=True)
class DistillationBatch:
    """One training step of the student as its distiller sees it."""

    student: StudentOutput
    "(B, C) logits; tokens behind each block where the distiller wants them"
    labels: Tensor
    "int64 (B,), 0..c-1 within the task; below 0 for an exemplar of an earlier one"
    task: int
    "0-based"
    class_range: tuple[int, int]
    "the task's class positions, first and last + 1; c of them"
    inputs: Tensor
    "what student_model.forward was given"
    query: Tensor | None
    "and the query beside it"
    student_model: PromptedViT
    teacher_logits: Tensor | None = None
    "float32 (B, c), combined logits of the current classes"
    teacher_hidden: tuple[Tensor, ...] = ()
    "(B, 1 + Pt, Dt) behind each of the teacher's blocks, where wanted"
    teacher: PromptedViT | None = None
    "frozen"

    @property
    def cls_logits(self) -> Tensor:
        """float32 (B, c) of the class token's head: the same as setting the logits of all other classes to -inf."""
        return self.student.cls_logits[:, slice(*self.class_range)].float()

    @property
    def kd_logits(self) -> Tensor:
        """Logits of the head on the KD token, float32 (B, c)."""
        assert self.student.kd_logits is not None
        return self.student.kd_logits[:, slice(*self.class_range)].float()

    @property
    def target(self) -> Tensor:
        """Logits of the teacher, float32 (B, c), for a distiller that has a teacher."""
        assert self.teacher_logits is not None
        return self.teacher_logits


class Distiller(nn.Module):
    """loss = (1 - alpha) * CE(head(CLS), y) + alpha * term.

    Parameters of a distiller (connectors, auxiliary heads) learn with the student's, are part of every checkpoint, and
    are thrown away after training.
    """

    needs_teacher: ClassVar[bool] = True
    "whether a teacher is trained at all"
    kd_token: ClassVar[bool] = False
    "whether the student gets a KD token with a head of its own"
    kd_rows: ClassVar[bool] = False
    "whether KD key and value rows come with it"
    needs_hidden: ClassVar[bool] = False
    "whether `loss` reads the tokens behind every block of student and teacher"
    needs_tail: ClassVar[bool] = False
    "whether `loss` runs the teacher's own blocks: its backbone must be at hand even when its answers are kept"
    maps_prompts: ClassVar[bool] = False
    "whether the teacher's prompts, mapped, join the student's"
    remembers: ClassVar[bool] = False
    "whether later tasks need what only checkpoints hold: a finished run cannot be extended then"
    tau: ClassVar[float] = 2.0
    "temperature unless the user gives one"
    refusal: ClassVar[str] = ""
    "why it does not work with some learners, see `works_with`"

    def __init__(self, spec: DistillSpec) -> None:
        super().__init__()
        self.spec = spec

    @classmethod
    def works_with(cls, learner: type[Learner]) -> bool:
        """Whether this distiller makes sense with a kind of learner."""
        return True

    def loss(self, batch: DistillationBatch) -> Tensor:
        """The loss of a batch: a scalar, the mean over its images."""
        raise NotImplementedError

    def begin_task(self, task: int, student: PromptedViT, teacher: PromptedViT | None) -> None:
        """Called before the student trains on a task; not called again when that training is resumed."""

    def begin_retraining(self, task: int, student: PromptedViT) -> bool:
        """Called before the first epoch of retraining; whether the optimiser must forget its moments."""
        return False

    def before_step(self, student: PromptedViT) -> None:
        """Called between backward and the optimiser's step."""

    def end_task(self, task: int, student: PromptedViT) -> None:
        """Called when the student has trained on a task and its learner has ended it."""

    def report(self) -> dict[str, object]:
        """What metrics.json says of the distiller, as plain JSON values."""
        return {}

    def hard(self, batch: DistillationBatch) -> Tensor:
        """The part of the loss that comes from labels: (1 - a) CE(head(CLS), y)."""
        return (1 - self.spec.alpha) * F.cross_entropy(batch.cls_logits, batch.labels)


def divergence(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), mean over the batch (arXiv 1503.02531)."""
    log_student = F.log_softmax(student / tau, dim=1)
    log_teacher = F.log_softmax(teacher / tau, dim=1)
    return tau * tau * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def regrid(tokens: Tensor, grid: int) -> Tensor:
    """(B, 1 + P, D) -> (B, 1 + grid^2, D): patches resampled (area mean down, bilinear up), class token kept."""
    batch, count, width = tokens.shape
    own = round((count - 1) ** 0.5)
    if own == grid:
        return tokens
    maps = tokens[:, 1:].transpose(1, 2).reshape(batch, width, own, own)
    if own > grid:
        maps = F.adaptive_avg_pool2d(maps, grid)
    else:
        maps = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
    return torch.cat([tokens[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)
