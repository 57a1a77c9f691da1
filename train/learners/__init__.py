"""Learners: what learns beside the heads. Prompt learners decide which key and value rows a block sees."""

from __future__ import annotations

from .apt import APT
from .base import BlockPrompt, Learner, LearnerSpec
from .coda import CODAPrompt
from .dualprompt import DualPrompt
from .finetune import FineTune
from .frozen import Frozen
from .l2p import L2P

LEARNERS: dict[str, type[Learner]] = {
    "l2p": L2P,
    "dualprompt": DualPrompt,
    "coda": CODAPrompt,
    "apt": APT,
    "finetune": FineTune,
    "frozen": Frozen,
}

__all__ = ["LEARNERS", "BlockPrompt", "Learner", "LearnerSpec"]
