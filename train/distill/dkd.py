"""DKD (arXiv 2203.08679): the divergence of target and non-target classes apart, weighted 1 and 4."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationBatch, Distiller

TARGET_WEIGHT, OTHERS_WEIGHT = 1.0, 4.0
"weights of TCKD and NCKD in the CDL paper's experiments"


class DKD(Distiller):
    """In a task of two classes one class is not the target: NCKD compares one-class distributions and is 0."""

    tau: ClassVar[float] = 4.0

    def loss(self, batch: DistillationBatch) -> Tensor:
        """(1 - a) CE(head(CLS), y) + a (TCKD + 4 NCKD)."""
        term = decoupled(batch.cls_logits, batch.target, batch.labels, self.spec.tau)
        return self.hard(batch) + self.spec.alpha * term


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, tau: float) -> Tensor:
    """tau^2 (TCKD + 4 NCKD), mean over the batch. student, teacher: (B, c) logits; labels: int64 (B,)."""
    log_student, log_teacher = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
    is_target = F.one_hot(labels, student.shape[1]).bool()
    count = student.shape[1]

    def split(log_p: Tensor) -> tuple[Tensor, Tensor]:
        """log (p_target, 1 - p_target) (B, 2), and the logits of the others (B, c - 1), unnormalised."""
        others = log_p.masked_select(~is_target).view(len(log_p), count - 1)
        rest = torch.logsumexp(others, dim=1) if count > 1 else torch.full_like(log_p[:, 0], -torch.inf)
        return torch.stack([log_p[is_target], rest], dim=1), others

    (pair_s, others_s), (pair_t, others_t) = split(log_student), split(log_teacher)
    if count == 1:
        return student.sum() * 0  # one class: both sides are certain
    target = F.kl_div(pair_s, pair_t, reduction="batchmean", log_target=True)
    rest = F.kl_div(
        F.log_softmax(others_s, dim=1), F.log_softmax(others_t, dim=1), reduction="batchmean", log_target=True
    )
    return tau * tau * (TARGET_WEIGHT * target + OTHERS_WEIGHT * rest)
