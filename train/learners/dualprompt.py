"""DualPrompt (arXiv 2204.04799): general rows in blocks 0-1, one expert entry a task in blocks 2-4."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import BlockPrompt, Entries, Learner, LearnerSpec, cosine, halves, register, uniform

GENERAL_BLOCKS, GENERAL_LENGTH = (0, 1), 6
EXPERT_BLOCKS, EXPERT_LENGTH = (2, 3, 4), 20


@register("dualprompt")
class DualPrompt(Learner):
    """While training, the task's own entry is used; at inference that of the nearest key learnt so far, per block.

    In the CDL authors' code (spec.compat) entries of tasks to come may be nearest too.
    """

    selection: ClassVar[dict[str, object]] = {"kind": "top-k", "k": 1}

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        generator = self.generator(0)

        def each(blocks: tuple[int, ...], *shape: int) -> nn.ParameterDict:
            return nn.ParameterDict({str(b): uniform(shape, generator) for b in blocks if b < spec.depth})

        self.general = each(GENERAL_BLOCKS, GENERAL_LENGTH, spec.width)
        self.expert = each(EXPERT_BLOCKS, spec.tasks, EXPERT_LENGTH, spec.width)
        self.key = each(EXPERT_BLOCKS, spec.tasks, spec.key_width)

    def blocks(self) -> tuple[int, ...]:
        """The blocks with expert entries, 2-4 or as many as there are."""
        return tuple(b for b in EXPERT_BLOCKS if b < self.spec.depth)

    def at_block(self, block: int, query: Tensor | None, training: bool) -> BlockPrompt | None:
        """General rows (1, 3, D) for everyone, or expert rows (B, 10, D) of one entry."""
        if block in GENERAL_BLOCKS:
            keys, values = halves(self.general[str(block)])
            return BlockPrompt(keys[None], values[None])
        if block not in self.blocks():
            return None
        assert query is not None
        current = self.learnt - 1
        similarity = self.similarity(block, query)
        if training:
            keys, values = halves(self.expert[str(block)][current])
            return BlockPrompt(keys[None], values[None], loss=(1 - similarity[:, current]).mean())
        keys, values = halves(self.expert[str(block)][similarity.argmax(dim=1)])
        return BlockPrompt(keys, values, weights=similarity.detach())

    def entries(self, block: int) -> Entries:
        """Prompts and keys of a block, an entry for each task, and which inference may select."""
        key = str(block)
        return Entries(self.expert[key], self.key[key], tuple(self.learnt_entries().tolist()))

    def similarity(self, block: int, query: Tensor) -> Tensor:
        """Cosine to the key of each entry that inference may select: others are cut off, not only unlikely."""
        return cosine(query, self.key[str(block)][: len(self.learnt_entries())])

    def learnt_entries(self) -> Tensor:
        """Indices of the entries that inference may select, int64 (K,)."""
        return torch.arange(self.spec.tasks if self.spec.compat else max(1, self.learnt))
