"""Fine-tuning: every weight of the backbone learns, and there are no prompts. The learner that M2KD was written for."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .base import BlockPrompt, Learner, register


@register("finetune")
class FineTune(Learner):
    """The stem, positions, blocks and last norm learn with a linear head; pre-training's own head is left out.

    Nothing protects what was learnt before, unless the distiller does.
    """

    needs_query: ClassVar[bool] = False
    whole_network: ClassVar[bool] = True
    network_rate: ClassVar[float] = 0.1

    def at_block(self, block: int, query: Tensor | None, training: bool) -> BlockPrompt | None:
        """None: the whole network learns, and no block gets a prompt."""
        return None
