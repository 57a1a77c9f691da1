"""Distillers: how a student learns from the frozen teacher's logits of the current classes."""

from __future__ import annotations

from .base import Distiller
from .kd import KD
from .kdp import KDP
from .none import NoDistillation

DISTILLERS: dict[str, type[Distiller]] = {"none": NoDistillation, "kd": KD, "kdp": KDP}

__all__ = ["DISTILLERS", "Distiller"]
