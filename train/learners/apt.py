"""APT, additive prompt tuning (ICCV 2025): every block adds one learnt row to the class token's key and value."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import BlockPrompt, Learner, LearnerSpec, register


@register("apt")
class APT(Learner):
    """`prompt` is what is learnt in a task; `merged` is what inference uses: c * old + (1 - c) * new.

    The next task goes on from the merged prompt: the paper has one set of prompts for all tasks, and its merge replaces
    it (P <- c P_old + (1 - c) P_new). Its published code, and that of CDL, leaves `prompt` as it was learnt and merges
    into a second tensor, so each task goes on from the unmerged prompt: spec.compat.
    """

    needs_query: ClassVar[bool] = False
    head: ClassVar[str] = "normalised"

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        generator = self.generator(0)
        self.prompt = nn.Parameter(torch.randn((spec.depth, 2, spec.width), generator=generator) * 0.02)
        self.merged: Tensor
        self.register_buffer("merged", torch.zeros(spec.depth, 2, spec.width))

    def end_task(self, task: int) -> None:
        """Merge, and let the next task start from where the class says."""
        new, c = self.prompt.data, self.spec.apt_momentum
        self.merged.copy_(new if task == 0 else c * self.merged + (1 - c) * new)
        if not self.spec.compat:
            self.prompt.data.copy_(self.merged)

    def at_block(self, block: int, query: Tensor | None, training: bool) -> BlockPrompt | None:
        """One key row and one value row, added to the class token's."""
        key, value = (self.prompt if training else self.merged)[block]
        return BlockPrompt(cls_key=key, cls_value=value)
