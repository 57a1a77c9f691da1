"""KD (arXiv 1503.02531) on the one head of the student."""

from __future__ import annotations

from torch import Tensor

from .base import Distiller, Lesson, divergence


class KD(Distiller):
    """Labels and teacher pull at the same logits."""

    def loss(self, lesson: Lesson) -> Tensor:
        """(1 - a) CE(head(CLS), y) + a tau^2 KL(teacher || head(CLS))."""
        soft = divergence(lesson.cls_logits, lesson.target, self.spec.tau)
        return self.hard(lesson) + self.spec.alpha * soft
