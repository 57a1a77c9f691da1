"""Prompt learners: each decides which key and value rows a block sees, and what it learns from its own query."""

from __future__ import annotations

from .apt import APT
from .base import BlockPrompt, Learner, LearnerSpec
from .coda import CODAPrompt
from .dualprompt import DualPrompt
from .l2p import L2P

LEARNERS: dict[str, type[Learner]] = {"l2p": L2P, "dualprompt": DualPrompt, "coda": CODAPrompt, "apt": APT}

__all__ = ["LEARNERS", "BlockPrompt", "Learner", "LearnerSpec"]
