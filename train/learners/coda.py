"""CODA-Prompt (arXiv 2211.13218): a weighted sum of components in blocks 0-4; each task adds some."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BlockPrompt, Entries, Learner, LearnerSpec, halves, register

BLOCKS, POOL, LENGTH = (0, 1, 2, 3, 4), 100, 8


@register("coda")
class CODAPrompt(Learner):
    """prompt = sum_k cos(q * A_k, K_k) P_k over the components of the tasks seen so far.

    The pool is shared by the tasks that were planned; a run that is extended gets as many components for each new one.
    """

    selection: ClassVar[dict[str, object]] = {"kind": "weighted", "k": 5}

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.per_task = max(1, POOL // (spec.pool_tasks or spec.tasks))
        total = self.per_task * spec.tasks

        def each(*shape: int) -> nn.ParameterDict:
            # Filled by begin_task: the components of later tasks do not exist yet for anyone who reads these.
            return nn.ParameterDict({str(b): nn.Parameter(torch.zeros(total, *shape)) for b in self.blocks()})

        self.prompt, self.key, self.attention = each(LENGTH, spec.width), each(spec.key_width), each(spec.key_width)

    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with prompts: 0 to 4, or as many as there are."""
        return tuple(b for b in BLOCKS if b < self.spec.depth)

    def components(self) -> int:
        """Number of components that are in use, from all tasks so far."""
        return self.per_task * max(1, self.learnt)

    def begin_task(self, task: int) -> None:
        """Gram-Schmidt: the new components start orthonormal to each other and to all earlier ones."""
        super().begin_task(task)
        generator = self.generator(task)
        for table in (self.prompt, self.key, self.attention):
            for b in self.blocks():
                rows = table[str(b)].data.flatten(1)
                first = task * self.per_task
                for i in range(first, first + self.per_task):
                    rows[i] = _orthonormal(rows[:i], generator).to(rows)

    def at_block(self, block: int, query: Tensor | None, training: bool) -> BlockPrompt | None:
        """Key rows and value rows, (B, 4, D) each."""
        if block not in self.blocks():
            return None
        assert query is not None
        prompt, key, attention = (self._rows(t[str(block)], training) for t in (self.prompt, self.key, self.attention))
        weights = F.cosine_similarity(query[:, None] * attention, key, dim=2)
        keys, values = halves(torch.einsum("bk,kld->bld", weights, prompt))
        return BlockPrompt(keys, values, weights=weights.detach())

    def entries(self, block: int) -> Entries:
        """Prompts, keys and attention vectors of the components of a block, and which are in use."""
        key = str(block)
        return Entries(self.prompt[key], self.key[key], tuple(range(self.components())), self.attention[key])

    def similarity(self, block: int, query: Tensor) -> Tensor:
        """Weight of each component in use for queries (B, Q): (B, K)."""
        attention, key = (self._rows(t[str(block)], training=True) for t in (self.attention, self.key))
        return F.cosine_similarity(query[:, None] * attention, key, dim=2)

    def _rows(self, table: Tensor, training: bool) -> Tensor:
        """The components in use; while training only the current task's carry a gradient."""
        used = table[: self.components()]
        if not training:
            return used
        first = (self.learnt - 1) * self.per_task
        return torch.cat([used[:first].detach(), used[first:]])


def _orthonormal(earlier: Tensor, generator: torch.Generator) -> Tensor:
    """A unit vector orthogonal to the rows of `earlier`, (n, D) -> (D,).

    With n >= D there is none left (100 components of width 96): then a random unit vector, which is what the remaining
    components of a full basis can be at best.
    """
    vector = torch.randn(earlier.shape[1], generator=generator)
    vector = vector / vector.norm()
    if 0 < earlier.shape[0] < earlier.shape[1]:
        # Learnt rows are no longer orthonormal among themselves: project on the span's orthonormal basis.
        basis = torch.linalg.qr(earlier.detach().float().cpu().t()).Q
        for _ in range(2):  # the second round removes what rounding left in the first
            vector = vector - basis @ (basis.t() @ vector)
            vector = vector / vector.norm()
    return vector
