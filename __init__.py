"""cdl-edge: from a folder of photographs to a small, fast, updatable classifier on an edge device.

The verbs of the command line are functions here: `from cdl_edge import train, export, predict`; see api.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
VERBS = (
    *("build", "pretrain", "evaluate", "predict", "profile", "compare", "inspect", "validate", "doctor"),
    *("create_pack", "install_pack", "rollback", "versions"),
)


def __getattr__(name: str) -> Any:
    """The verbs, found when first asked for; those that are rooms too (train, export, report) are callable modules."""
    if name in VERBS:
        return getattr(import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
