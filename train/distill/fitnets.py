"""FitNets (arXiv 1412.6550) as the CDL paper uses it: KD, and the last tokens of the student imitate the teacher's."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationBatch, DistillSpec, regrid
from .kd import KD

WEIGHT = 0.1
"of the feature term (CDL paper)"


class FitNets(KD):
    """+ 0.1 * MSE(Linear(student's last tokens), teacher's last tokens), the Linear learnt and thrown away."""

    needs_hidden: ClassVar[bool] = True

    def __init__(self, spec: DistillSpec) -> None:
        super().__init__(spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.regressor = nn.Linear(spec.student_width, spec.teacher_width)

    def loss(self, batch: DistillationBatch) -> Tensor:
        """KD's loss and the feature term."""
        wanted = regrid(batch.teacher_hidden[-1].float(), self.spec.student_grid)
        given = self.regressor(batch.student.hidden[-1]).float()
        return super().loss(batch) + self.spec.features * WEIGHT * F.mse_loss(given, wanted)
