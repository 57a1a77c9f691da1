"""Rooms that are verbs too: `cdl_edge.train` is a package, and `from cdl_edge import train` is to be called."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(module: str) -> None:
    """Let a module be called like the function of its name in `api`, which is imported only then."""
    verb = module.rpartition(".")[2]

    class Verb(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(import_module("..api", module), verb)(*args, **kwargs)

    sys.modules[module].__class__ = Verb
