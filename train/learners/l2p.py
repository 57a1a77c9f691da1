"""L2P (arXiv 2112.08654), the variant of the CODA-Prompt code base: rows in block 0 from the five nearest of 30."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .base import BlockPrompt, Entries, Learner, LearnerSpec, cosine, halves, register, uniform

POOL, LENGTH, TOP = 30, 20, 5


@register("l2p")
class L2P(Learner):
    """An entry that no training image ever selected is unlearnt: it is masked at inference, but not in the CDL authors'
    code (spec.compat), whose key loss is also a sum over the selected entries, not their mean.
    """

    selection: ClassVar[dict[str, object]] = {"kind": "top-k", "k": TOP}

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        generator = self.generator(0)
        self.prompt = uniform((POOL, LENGTH, spec.width), generator)
        self.key = uniform((POOL, spec.key_width), generator)
        self.used: Tensor
        self.register_buffer("used", torch.zeros(POOL, dtype=torch.bool))

    def blocks(self) -> tuple[int, ...]:
        """Index of the only block with prompts: 0."""
        return (0,)

    def at_block(self, block: int, query: Tensor | None, training: bool) -> BlockPrompt | None:
        """Key rows and value rows of the selected entries, nearest first: (B, 50, D) each."""
        if block != 0:
            return None
        assert query is not None
        similarity = self.similarity(block, query)
        allowed = similarity if training or not self._masks() else similarity.masked_fill(~self.used, -torch.inf)
        index = allowed.topk(TOP, dim=1).indices
        if training:
            self.used[index.detach().flatten()] = True
        keys, values = halves(self.prompt[index])
        # The mean over the batch, not a sum: the loss must not grow with the batch or the number of devices.
        loss = None
        if training:
            distance = 1 - similarity.gather(1, index)
            loss = distance.sum(dim=1).mean() if self.spec.compat else distance.mean()
        return BlockPrompt(keys.flatten(1, 2), values.flatten(1, 2), loss=loss, weights=allowed.detach())

    def similarity(self, block: int, query: Tensor) -> Tensor:
        """Cosine of each query (B, Q) to every key of the pool: (B, K)."""
        return cosine(query, self.key)

    def entries(self, block: int) -> Entries:
        """Prompts and keys of the whole pool, and which inference may select."""
        return Entries(self.prompt, self.key, tuple(self.learnt_entries().tolist()))

    def synchronise(self, any_process: Callable[[Tensor], Tensor]) -> None:
        """Count entries as used that any process has selected."""
        self.used.copy_(any_process(self.used))

    def learnt_entries(self) -> Tensor:
        """Indices of the entries that inference may select, int64 (K,)."""
        return torch.nonzero(self.used.cpu()).flatten() if self._masks() else torch.arange(POOL)

    def _masks(self) -> bool:
        """Whether some entries must not be selected."""
        return not self.spec.compat and bool(self.used.any())
