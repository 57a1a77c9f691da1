"""No distillation: the student learns from labels alone, and no teacher is trained."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import Distiller


class NoDistillation(Distiller):
    """Cross entropy."""

    needs_teacher: ClassVar[bool] = False

    def loss(
        self, cls_logits: Tensor, kd_logits: Tensor | None, teacher_logits: Tensor | None, labels: Tensor
    ) -> Tensor:
        """CE(head(CLS), y)."""
        return F.cross_entropy(cls_logits, labels)
