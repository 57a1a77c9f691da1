"""Block-wise logit distillation (arXiv 2411.01547): the teacher's tail reads the student's blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationBatch, Distiller, DistillSpec, divergence, regrid

GROUPS = 4
"groups of blocks, n (4 of 3 for a ViT of 12 blocks)"
CROSS = 0.5
"gamma, the weight of the cross term; the paper's value was not to be found: ours"


class Blockwise(Distiller):
    """Stepping stones N_i = teacher blocks behind group i o connector C_i o student groups 1..i; N_n is the student.

    loss = sum_i 1 / 2^(n - i) * ((1 - a) CE(N_i) + a tau^2 KL(teacher || N_i) + 0.5 a tau^2 KL(mean of all N || N_i)).
    The paper's alpha and beta are this project's 1 - a and a. The teacher's part is frozen, with the prompts of
    inference; connectors are Linears on all tokens, learnt, and thrown away with the stones.
    """

    needs_hidden: ClassVar[bool] = True
    needs_tail: ClassVar[bool] = True

    def __init__(self, spec: DistillSpec) -> None:
        super().__init__(spec)
        groups = min(GROUPS, spec.student_depth, spec.teacher_depth)
        self.cuts = [
            (round(i * spec.student_depth / groups), round(i * spec.teacher_depth / groups)) for i in range(1, groups)
        ]
        "(student blocks run, teacher blocks skipped) of each stone"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.connectors = nn.ModuleList(nn.Linear(spec.student_width, spec.teacher_width) for _ in self.cuts)

    def loss(self, batch: DistillationBatch) -> Tensor:
        """The loss that the class describes, a scalar."""
        teacher, tau, alpha = batch.teacher, self.spec.tau, self.spec.alpha
        assert teacher is not None
        answers = []
        for connector, (run, skipped) in zip(self.connectors, self.cuts, strict=True):
            tokens = regrid(connector(batch.student.hidden[run - 1]), self.spec.teacher_grid)
            output = teacher(tokens, batch.query, start=skipped)
            answers.append(teacher.combine(output)[:, slice(*batch.class_range)].float())
        answers.append(batch.cls_logits)
        # What all stones agree on is a target, not something to be pulled at.
        common = torch.stack(answers).mean(dim=0).detach()
        total = torch.zeros((), device=batch.labels.device)
        for i, answer in enumerate(answers, start=1):
            hard = F.cross_entropy(answer, batch.labels)
            soft = divergence(answer, batch.target, tau) + CROSS * divergence(answer, common, tau)
            total = total + ((1 - alpha) * hard + alpha * soft) / 2 ** (len(answers) - i)
        return total
