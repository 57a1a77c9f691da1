"""KD (arXiv 1503.02531) on the one head of the student."""

from __future__ import annotations

from torch import Tensor

from .base import DistillationBatch, Distiller, divergence


class KD(Distiller):
    """Labels and teacher pull at the same logits."""

    def loss(self, batch: DistillationBatch) -> Tensor:
        """(1 - a) CE(head(CLS), y) + a tau^2 KL(teacher || head(CLS))."""
        soft = divergence(batch.cls_logits, batch.target, self.spec.tau)
        return self.hard(batch) + self.spec.alpha * soft
