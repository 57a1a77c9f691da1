"""Which graph suits which runtime."""

from __future__ import annotations

from ..errors import choose

PROFILES = {"ort": "ONNX Runtime 1.23 or newer: opset 23, fused Attention"}


def check_profile(name: str) -> str:
    """Return the name. Raises: InputError for an unknown profile, with the closest match."""
    return choose("export profile", name, PROFILES)
