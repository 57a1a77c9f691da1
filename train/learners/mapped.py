"""The teacher's prompts beside the student's: their rows, brought to the student's width by a learnt attention.

Source: CDL-Prompt, arXiv 2407.13911v1 (attention-based prompt mapping). The teacher's pool is needed at inference, its
backbone is not: it is asked with the student's query, as it was while the teacher trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import BlockPrompt, Learner, LearnerSpec, halves


class PromptAttention(nn.Module):
    """softmax(Q K^T / sqrt(t)) V among the rows of one prompt: (..., n, t) -> (..., n, s)."""

    def __init__(self, teacher_width: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(teacher_width, teacher_width)
        self.key = nn.Linear(teacher_width, teacher_width)
        self.value = nn.Linear(teacher_width, width)

    def forward(self, rows: Tensor) -> Tensor:
        """Prompt rows of the teacher (..., n, t) -> rows of the student's width (..., n, s)."""
        scores = self.query(rows) @ self.key(rows).transpose(-2, -1) / rows.shape[-1] ** 0.5
        mapped: Tensor = scores.softmax(dim=-1) @ self.value(rows)
        return mapped


class MappedPrompts(nn.Module):
    """A frozen copy of the teacher's learner, and one attention a block that learns as prompts do.

    Key rows attend among key rows and value rows among value rows, through one module. The copy always chooses as
    inference does, also while the student trains and also where the teacher itself was told the task (DualPrompt): its
    rows do not learn here, so nothing is gained by knowing the task, and the mapping sees in training what it will see
    in use. Ours: L2P's five entries are mapped each on its own, not together, so that every entry has one mapped
    form, which can be computed beforehand.
    """

    rate: ClassVar[float] = 0.01
    """share of --learning-rate that the attentions learn at: all tasks share them, nothing protects them. Measured
    (photographs, ten tasks, rate 0.005, seed 0; accuracy / forgetting): L2P 19.0 / 23.7 at 1, 26.9 / 16.3 at 0.1,
    28.2 / 14.1 at 0.01"""

    def __init__(self, kind: type[Learner], spec: LearnerSpec, teacher: tuple[int, int]) -> None:
        """kind, spec: the student's learner and its sizes; teacher: width and depth of the teacher."""
        super().__init__()
        width, depth = teacher
        self.teacher = kind(replace(spec, width=width, depth=depth)).requires_grad_(False)
        # A block that the teacher does not have taught its prompt nothing.
        shared = range(min(depth, spec.depth))
        asked = self.teacher.blocks()
        blocks = [b for b in shared if b not in asked and self._fixed(b)] + [b for b in asked if b in shared]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.attention = nn.ModuleDict({str(b): PromptAttention(width, spec.width) for b in blocks})

    def _fixed(self, block: int) -> bool:
        """Whether the teacher has rows in a block that are the same for all images."""
        prompt = self.teacher.at_block(block, None, training=False)
        return prompt is not None and prompt.keys is not None

    def copy(self, teacher: Learner) -> None:
        """Take over the teacher's pool, keys and counts as they are now."""
        self.teacher.load_state_dict(teacher.state_dict())

    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with mapped rows."""
        return tuple(map(int, self.attention))

    def mapping(self, block: int) -> PromptAttention:
        """The attention of one of these blocks."""
        attention = self.attention[str(block)]
        assert isinstance(attention, PromptAttention)
        return attention

    def table(self, block: int) -> tuple[Tensor, Tensor] | None:
        """Mapped key rows and value rows of every entry, (K, n, D) each; None where entries are mixed, or not told."""
        if block not in self.teacher.blocks() or self.teacher.selection["kind"] != "top-k":
            return None
        entries = self.teacher.entries(block)
        if entries is None:
            return None
        keys, values = halves(entries.rows)
        return self.mapping(block)(keys), self.mapping(block)(values)

    def at_block(self, block: int, query: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Mapped key rows and value rows, (B or 1, n, D) each, or None. query: (B, Q)."""
        if block not in self.blocks():
            return None
        prompt = self.teacher.at_block(block, query, training=False)
        assert prompt is not None
        table = self.table(block)
        if table is None:
            assert prompt.keys is not None and prompt.values is not None
            return self.mapping(block)(prompt.keys), self.mapping(block)(prompt.values)
        # A pool has fewer entries than a batch selects: mapped first, gathered afterwards.
        assert prompt.weights is not None
        index = prompt.weights.topk(int(str(self.teacher.selection["k"])), dim=1).indices
        keys, values = table
        return keys[index].flatten(1, 2), values[index].flatten(1, 2)

    def beside(self, block: int, query: Tensor | None, own: BlockPrompt | None) -> BlockPrompt | None:
        """The student's own prompt of the block with the mapped rows in front."""
        rows = self.at_block(block, query)
        if rows is None or own is None or own.keys is None or own.values is None:
            return own
        batch = max(len(rows[0]), len(own.keys))
        keys, values = (
            torch.cat([mapped.expand(batch, -1, -1), mine.expand(batch, -1, -1)], dim=1)
            for mapped, mine in zip(rows, (own.keys, own.values), strict=True)
        )
        return replace(own, keys=keys, values=values)
