"""What learning changed in a file of constants: its exclusive or with the older file, tensor by tensor.

A tensor that has grown (a head with more classes, a pool with more entries) is compared in the corner that both have;
what is equal becomes zeros, which compress to nothing, whichever axis grew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..artefacts.external import Record
from ..errors import InputError


def difference(old: bytes, new: bytes, before: Iterable[Record], after: Iterable[Record]) -> bytes:
    """The difference of two files, as long as `new`. before, after: where the tensors of each file are.

    Raises: InputError for records that do not fit their file.
    """
    return _xor(new, _expected(old, len(new), before, after))


def apply(old: bytes, delta: bytes, before: Iterable[Record], after: Iterable[Record]) -> bytes:
    """The newer file: the inverse of `difference`, with the same records. Raises: InputError as there."""
    return _xor(delta, _expected(old, len(delta), before, after))


def _xor(a: bytes, b: np.ndarray) -> bytes:
    return bytes(np.bitwise_xor(np.frombuffer(a, np.uint8), b).tobytes())


def _expected(old: bytes, size: int, before: Iterable[Record], after: Iterable[Record]) -> np.ndarray:
    """The newer file as the older one foretells it: uint8 (size,), zeros where there is nothing to go by."""
    known = {record.name: record for record in before}
    expected = np.zeros(size, np.uint8)
    for record in after:
        _check(record, size)
        source = known.get(record.name)
        if source is None or source.dtype != record.dtype or len(source.dims) != len(record.dims):
            continue
        if record.length == 0:
            continue
        _check(source, len(old))
        tensor = np.zeros(record.dims, record.dtype)
        corner = tuple(slice(min(a, b)) for a, b in zip(source.dims, record.dims, strict=True))
        tensor[corner] = np.frombuffer(old, source.dtype, math.prod(source.dims), source.offset).reshape(source.dims)[
            corner
        ]
        expected[record.offset : record.offset + record.length] = np.frombuffer(tensor.tobytes(), np.uint8)
    return expected


def _check(record: Record, size: int) -> None:
    """A graph in a pack may say anything about its constants: nothing is read or written beyond their file."""
    whole = math.prod(record.dims) * np.dtype(record.dtype).itemsize == record.length and len(record.dims) <= 32
    if not whole or min(record.dims, default=0) < 0 or not 0 <= record.offset <= size - record.length:
        raise InputError(
            f"{record.location}: the constant {record.name!r} does not fit",
            got=f"{record.dtype} {record.dims}, {record.length} bytes at {record.offset}",
            expected=f"within {size} bytes",
            fix="export the bundle again",
        )


def by_location(records: Sequence[Record]) -> Mapping[str, list[Record]]:
    """File -> its constants, each name once (the graphs of a bundle share theirs)."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        found.setdefault(record.location, {}).setdefault(record.name, record)
    return {location: list(tensors.values()) for location, tensors in found.items()}
