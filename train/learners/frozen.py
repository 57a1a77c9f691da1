"""No prompts: the bare frozen backbone, the baseline that everything else must beat."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .base import BlockPrompt, Learner, register


@register("frozen")
class Frozen(Learner):
    """A learner without prompts: the backbone is frozen, only a head learns."""

    needs_query: ClassVar[bool] = False

    def at_block(self, block: int, query: Tensor | None, training: bool) -> BlockPrompt | None:
        """None: no block gets a prompt."""
        return None
