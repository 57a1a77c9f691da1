"""KD (arXiv 1503.02531) on the one head of the student."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Distiller, divergence


class KD(Distiller):
    """Labels and teacher pull at the same logits."""

    def loss(
        self, cls_logits: Tensor, kd_logits: Tensor | None, teacher_logits: Tensor | None, labels: Tensor
    ) -> Tensor:
        """(1 - a) CE(head(CLS), y) + a tau^2 KL(teacher || head(CLS))."""
        assert teacher_logits is not None
        hard = F.cross_entropy(cls_logits, labels)
        return (1 - self.alpha) * hard + self.alpha * divergence(cls_logits, teacher_logits, self.tau)
