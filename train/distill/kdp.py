"""KDP (arXiv 2407.13911): a KD token with its own head listens to the teacher, KD rows reach every token."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import Distiller, divergence


class KDP(Distiller):
    """The class token's head learns from labels, the KD token's from the teacher; inference mixes both by alpha."""

    kd_prompts: ClassVar[bool] = True

    def loss(
        self, cls_logits: Tensor, kd_logits: Tensor | None, teacher_logits: Tensor | None, labels: Tensor
    ) -> Tensor:
        """(1 - a) CE(head(CLS), y) + a tau^2 KL(teacher || kd_head(KD token))."""
        assert teacher_logits is not None and kd_logits is not None
        hard = F.cross_entropy(cls_logits, labels)
        return (1 - self.alpha) * hard + self.alpha * divergence(kd_logits, teacher_logits, self.tau)
