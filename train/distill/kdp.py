"""KDP (arXiv 2407.13911): a KD token with its own head listens to the teacher, KD rows reach every token."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..learners import Learner
from .base import DistillationBatch, Distiller, divergence


class KDToken(Distiller):
    """A KD token alone (DeiT, arXiv 2012.12877, in the CDL paper's tables): KDP without key and value rows."""

    kd_token: ClassVar[bool] = True
    refusal: ClassVar[str] = "the KD token is a prompt of a frozen backbone; where all weights learn there is none"

    @classmethod
    def works_with(cls, learner: type[Learner]) -> bool:
        """True for learners whose backbone is frozen."""
        return not learner.whole_network

    def loss(self, batch: DistillationBatch) -> Tensor:
        """(1 - a) CE(head(CLS), y) + a tau^2 KL(teacher || kd_head(KD token)); inference mixes both heads by a."""
        soft = divergence(batch.kd_logits, batch.target, self.spec.tau)
        return self.hard(batch) + self.spec.alpha * soft


class KDP(KDToken):
    """KD token, and in the blocks behind the first KD rows that every token attends to."""

    kd_rows: ClassVar[bool] = True
