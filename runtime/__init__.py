"""Runs a bundle: `load` opens one of its graphs on an engine. numpy, Pillow and one inference engine; never torch.

Importing this package loads no engine: `load` imports the one that is asked for.
"""

from __future__ import annotations

from ..artefacts.bundle import Bundle, open_bundle
from .loader import load
from .runner import Outputs, Runner

__all__ = ["Bundle", "Outputs", "Runner", "load", "open_bundle"]
