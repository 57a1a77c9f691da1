"""APT, additive prompt tuning (ICCV 2025): every block adds one learnt row to the class token's key and value."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import BlockPrompt, Learner, LearnerSpec

MOMENTUM = 0.7
"c of the merge, the paper's value for CIFAR-100 (0.8 for ImageNet-R)"


class APT(Learner):
    """`prompt` is what is learnt in a task; `merged` is what inference uses: c * old + (1 - c) * new."""

    needs_query: ClassVar[bool] = False
    head: ClassVar[str] = "normalised"

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        generator = self.generator(0)
        self.prompt = nn.Parameter(torch.randn((spec.depth, 2, spec.width), generator=generator) * 0.02)
        self.merged: Tensor
        self.register_buffer("merged", torch.zeros(spec.depth, 2, spec.width))
        self.momentum = MOMENTUM

    def end_task(self, task: int) -> None:
        """Merge; the next task starts from the merged prompt."""
        new = self.prompt.data
        self.merged.copy_(new if task == 0 else self.momentum * self.merged + (1 - self.momentum) * new)
        self.prompt.data.copy_(self.merged)

    def at_block(self, block: int, query: Tensor | None, training: bool) -> BlockPrompt | None:
        """One key row and one value row, added to the class token's."""
        key, value = (self.prompt if training else self.merged)[block]
        return BlockPrompt(cls_key=key, cls_value=value)
