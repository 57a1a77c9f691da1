"""Distillers: how a student learns from the frozen teacher, one file each."""

from __future__ import annotations

from .base import DistillationBatch, Distiller, DistillSpec
from .blockwise import Blockwise
from .cdl_prompt import CDLPrompt
from .dkd import DKD
from .fitnets import FitNets
from .kd import KD
from .kdp import KDP, KDToken
from .m2kd import M2KD
from .none import NoDistillation
from .reviewkd import ReviewKD
from .two_heads import TwoHeads

DISTILLERS: dict[str, type[Distiller]] = {
    "none": NoDistillation,
    "kd": KD,
    "dkd": DKD,
    "fitnets": FitNets,
    "reviewkd": ReviewKD,
    "two-heads": TwoHeads,
    "kd-token": KDToken,
    "kdp": KDP,
    "cdl-prompt": CDLPrompt,
    "blockwise": Blockwise,
    "m2kd": M2KD,
}

__all__ = ["DISTILLERS", "DistillSpec", "DistillationBatch", "Distiller"]
