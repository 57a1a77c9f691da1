"""Learners: what learns beside the heads. Prompt learners decide which key and value rows a block sees.

Each file of this folder holds one, and registers it: a new learner is a new file.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from .base import LEARNERS, BlockPrompt, Learner, LearnerSpec

_FIRST = ("l2p", "dualprompt", "coda", "apt", "finetune", "frozen")
"in the order in which they are listed everywhere; others follow"
for _name in (*_FIRST, *sorted(module.name for module in pkgutil.iter_modules(__path__))):
    import_module(f".{_name}", __name__)

__all__ = ["LEARNERS", "BlockPrompt", "Learner", "LearnerSpec"]
