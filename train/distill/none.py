"""No distillation: the student learns from labels alone, and no teacher is trained."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationBatch, Distiller


class NoDistillation(Distiller):
    """Cross entropy."""

    needs_teacher: ClassVar[bool] = False

    def loss(self, batch: DistillationBatch) -> Tensor:
        """CE(head(CLS), y)."""
        return F.cross_entropy(batch.cls_logits, batch.labels)
