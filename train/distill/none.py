"""No distillation: the student learns from labels alone, and no teacher is trained."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationBatch, Distiller


class NoDistillation(Distiller):
    """Cross entropy on the labels alone; no teacher."""

    needs_teacher: ClassVar[bool] = False

    def loss(self, batch: DistillationBatch) -> Tensor:
        """Cross entropy of the class token's head: CE(head(CLS), y), a scalar."""
        return F.cross_entropy(batch.cls_logits, batch.labels)
