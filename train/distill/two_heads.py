"""A control for KDP: a KD token and its head that hear the labels, not a teacher."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationBatch
from .kdp import KDToken


class TwoHeads(KDToken):
    """What a second head gives without any teacher: the student of `kd-token`, and no teacher is trained.

    Inference mixes both heads by a, as there. A gain of `kd-token` or `kdp` over this is a gain from distillation.
    """

    needs_teacher: ClassVar[bool] = False

    def loss(self, batch: DistillationBatch) -> Tensor:
        """(1 - a) CE(head(CLS), y) + a CE(kd_head(KD token), y), both over the current classes."""
        return self.hard(batch) + self.spec.alpha * F.cross_entropy(batch.kd_logits, batch.labels)
