"""Arrays out of an .npz of unknown origin: what they would take in memory is bounded before they are read."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np

MOST_BYTES = 64 << 20
"of all arrays of a file together, unpacked; the ranges of a ViT-L over 100 tasks are 40 MB"
MOST_MEMBERS = 64
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    ArithmeticError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,  # zipfile: encrypted
    SyntaxError,
    TypeError,
    UnicodeError,
)
"what zipfile, zlib and numpy's reader of headers say about bytes that are none of theirs"


@dataclass(frozen=True)
class ArraySpec:
    """The array that a name stands for."""

    dtype: str
    shape: tuple[int, ...]
    "its sizes; the first is the largest allowed, unless `exact`"
    exact: bool = False

    def check(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """Raises: ValueError for an array of another type or shape."""
        first = shape[:1] == self.shape[:1] if self.exact else shape[:1] <= self.shape[:1]
        if dtype != np.dtype(self.dtype) or len(shape) != len(self.shape) or not first or shape[1:] != self.shape[1:]:
            most = "" if self.exact else ", the first at most"
            raise ValueError(f"{name} is {dtype} {shape}, expected {self.dtype} {self.shape}{most}")


def read_npz(
    content: bytes | np.ndarray, wanted: Mapping[str, ArraySpec] | None = None, most: int = MOST_BYTES
) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; objects (pickles) are refused.

    Args:
        content: of the file. wanted: exactly these names, types and shapes; None: any.
        most: bytes of all of them together.

    Raises: ValueError for a file that is no .npz, is damaged, or holds something else or more.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content if isinstance(content, bytes) else content.tobytes())) as archive:
            members = archive.infolist()
            if len(members) > MOST_MEMBERS:
                raise ValueError(f"{len(members)} arrays, expected {MOST_MEMBERS} or fewer")
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    dtype, shape, fortran = _header(stream)
                    size = math.prod(shape) * dtype.itemsize
                    if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0 or len(shape) > 32:
                        raise ValueError(f"{name} is {dtype} {shape}")
                    if wanted is not None and name in wanted:
                        wanted[name].check(name, dtype, shape)
                    most -= size
                    if most < 0:
                        raise ValueError(f"{name} is {dtype} {shape}: too large")
                    data = stream.read(size + 1)
                if len(data) != size or name in found:
                    raise ValueError(f"{name} is not whole, or there twice")
                flat = np.frombuffer(data, dtype).copy()
                found[name] = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    except _BROKEN as error:
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if wanted is not None and set(found) != set(wanted):
        raise ValueError(f"arrays {', '.join(sorted(found))}, expected {', '.join(sorted(wanted))}")
    return found


def _header(stream: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], bool]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"arrays in a format of version {version}")
    return dtype, shape, fortran
