"""cdl-edge: from a folder of photographs to a small, fast, updatable classifier on an edge device."""

__version__ = "0.1.0"
