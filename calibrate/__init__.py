"""INT8 without the images of earlier tasks: ranges kept while learning, scales, a gate for every task."""

from __future__ import annotations

from ..verb import make_callable
from .flavours import FLAVOURS
from .scales import METHODS
from .search import GateError

__all__ = ["FLAVOURS", "METHODS", "GateError"]

make_callable(__name__)
