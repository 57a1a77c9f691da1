"""The JSON of a request, within bounds: small outside of its tensors, whose numbers are read piece by piece.

`json.loads` holds up every thread for as long as it reads, and makes some 30 times the bytes of lists in lists: 32 MiB
of them stop a server for 9 s. Here the arrays of numbers behind each "data" are cut out first and read in pieces,
between which other threads run; what is left has to be short.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError

TEXT_BYTES = 64 << 10
"of JSON outside of the arrays of numbers"
PIECE_BYTES = 64 << 10
"of numbers that are read at once, in a few milliseconds"
_NUMBERS = re.compile(rb"\s*:\s*(\[[0-9eE+\-.,\s\[\]]*)")
_STRUCTURE = bytes(sorted({*range(256)} - {*b"[],"}))
"what is deleted from an array to see its brackets and commas"
_BLANK = bytes.maketrans(b"[]", b"  ")


class Numbers:
    """The text of an array of numbers, nested or flat."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def read(self, shape: Sequence[int]) -> np.ndarray:
        """float64 of this shape. Raises: ValueError (what is wrong) unless it is flat, or nested as `shape` says."""
        count = int(np.prod(shape, dtype=object))
        flat, nested = structure([count]), None
        if len(flat) > len(self.text):
            raise ValueError(f"fewer than {count} numbers")
        found = self.text.translate(None, _STRUCTURE)
        if found != flat:
            nested = structure(shape)
            if found != nested:
                raise ValueError(f"brackets and commas of another shape, or not of {count} numbers")
        values = np.empty(count)
        text, begin, done = self.text.translate(_BLANK), 0, 0
        while begin < len(text):
            end = len(text) if begin + PIECE_BYTES >= len(text) else text.find(b",", begin + PIECE_BYTES)
            end = len(text) if end < 0 else end
            piece = _parse(text[begin:end])
            if done + len(piece) > count:
                break
            values[done : done + len(piece)] = piece
            begin, done = end + 1, done + len(piece)
        if done != count or begin < len(text):
            raise ValueError(f"not {count} numbers")
        if not np.isfinite(values).all():
            raise ValueError("a number that is not finite")
        return values.reshape(shape)


def _parse(text: bytes) -> np.ndarray:
    """The numbers between commas. Raises: ValueError."""
    try:
        return np.array(json.loads(b"[" + text + b"]"), np.float64)
    except OverflowError as error:
        raise ValueError(str(error)) from error


def structure(shape: Sequence[int]) -> bytes:
    """The brackets and commas of an array of this shape, none of its sizes 0."""
    text = b""
    for size in reversed(shape):
        text = b"[" + b",".join([text] * size) + b"]"
    return text


def parse(body: bytes) -> Any:
    """A document whose arrays of numbers behind "data" are Numbers.

    Raises: InputError for what is no JSON, or longer than TEXT_BYTES without those arrays.
    """
    arrays: list[Numbers] = []
    short = _without_numbers(body, arrays)
    waiting = iter(arrays)

    def constant(name: str) -> Numbers:
        # Each array was replaced by NaN, which JSON does not have: none of them is the client's own.
        found = next(waiting, None) if name == "NaN" else None
        if found is None:
            raise ValueError(f"{name} is no JSON")
        return found

    try:
        document = json.loads(short.decode("utf-8"), parse_constant=constant)
        if next(waiting, None) is not None:
            raise ValueError("an array at an odd place")
    except (ValueError, RecursionError) as error:
        raise InputError("the request is not JSON", got=str(error)[:200], expected="JSON of UTF-8") from error
    return document


def _without_numbers(body: bytes, arrays: list[Numbers]) -> bytes:
    """The text with NaN in place of the arrays, which are appended to `arrays`. Raises: InputError, see `parse`."""
    kept: list[bytes] = []
    room, done, begin = TEXT_BYTES, 0, body.find(b'"')
    while begin >= 0:
        end = _end_of_string(body, begin, begin + room)
        if end < 0:
            break
        found = _NUMBERS.match(body, end) if body[begin:end] == b'"data"' else None
        if found is not None:
            text = found[1].rstrip(b" \t\r\n,")
            kept.append(body[done : found.start(1)] + b" NaN ")
            arrays.append(Numbers(text))
            room -= len(kept[-1])
            done = end = found.start(1) + len(text)
        if end - done > room or room < 0:
            break
        begin = body.find(b'"', end)
    kept.append(body[done : done + room + 1])
    if len(kept[-1]) > room:
        raise InputError(
            "too much JSON",
            got=f'more than {TEXT_BYTES} bytes besides the arrays of numbers named "data"',
            expected="tensors, and little else",
            fix="send tensors as bytes, in the protocol's binary form",
        )
    if b"NaN" in kept[-1] or any(b"NaN" in part[:-5] for part in kept[:-1]):
        raise InputError("the request is not JSON", got="NaN", expected="numbers")
    return b"".join(kept)


def _end_of_string(body: bytes, begin: int, limit: int) -> int:
    """Behind the closing quote of the string that begins here; -1: none before `limit`."""
    end = begin
    while True:
        end = body.find(b'"', end + 1, limit)
        if end < 0:
            return -1
        slashes = end
        while body[slashes - 1 : slashes] == b"\\":
            slashes -= 1
        if (end - slashes) % 2 == 0:
            return end + 1
