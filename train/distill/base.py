"""The interface of a distiller, and the divergence most of them share."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor


class Distiller:
    """loss = (1 - alpha) * CE(head(CLS), y) + alpha * term; all logits are those of the current classes only."""

    needs_teacher: ClassVar[bool] = True
    "whether a teacher is trained at all"
    kd_prompts: ClassVar[bool] = False
    "whether the student gets KD prompts and a second head"

    def __init__(self, alpha: float, tau: float) -> None:
        self.alpha, self.tau = alpha, tau

    def loss(
        self, cls_logits: Tensor, kd_logits: Tensor | None, teacher_logits: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Scalar. cls_logits, kd_logits, teacher_logits: (B, c); labels: int64 (B,) in 0..c-1."""
        raise NotImplementedError


def divergence(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), mean over the batch (arXiv 1503.02531)."""
    log_student = F.log_softmax(student / tau, dim=1)
    log_teacher = F.log_softmax(teacher / tau, dim=1)
    return tau * tau * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
