"""Many constants in one file, at places that an engine can map."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

ALIGNMENT = 64
"bytes: a cache line, so that an engine may map the file and use it in place"


def pack(constants: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """One file, and name -> (offset, length). Sorted by name: the same constants give the same bytes."""
    content = bytearray()
    where: dict[str, tuple[int, int]] = {}
    for name in sorted(constants):
        content += b"\0" * (-len(content) % ALIGNMENT)
        data = np.ascontiguousarray(constants[name]).tobytes()
        where[name] = (len(content), len(data))
        content += data
    return bytes(content), where
