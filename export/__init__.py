"""From a RUN to a BUNDLE: the student as a static graph, proven equal before it gets its name."""

from __future__ import annotations

from ..verb import make_callable
from .bundle import export
from .parity import ParityError
from .profiles import PROFILES

__all__ = ["PROFILES", "ParityError", "export"]

make_callable(__name__)
