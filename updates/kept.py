"""Pictures that are kept in a bundle, beside what was learnt from them: only where somebody asked for it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..artefacts.layout import PICTURES
from ..decoder import Picture
from ..errors import InputError
from .enrolments import KEPT_BYTES

_SUFFIXES = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "HEIF": "heic"}
"of formats whose name is no suffix"


def kept_pictures(
    sources: Sequence[Path | str | bytes | np.ndarray], others: Iterable[Path | bytes]
) -> dict[str, bytes]:
    """Name in the bundle -> content, in the order of the sources: files as they are, frames as PNG.

    others: those that are kept already. Raises: InputError for more than KEPT_BYTES together, and for two that are the
        same file.
    """
    found: dict[str, bytes] = {}
    for source in sources:
        content, suffix = _content(source)
        name = f"{PICTURES}/{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"
        if name in found:
            raise InputError(f"two of the pictures are one file: {source if isinstance(source, str | Path) else name}")
        found[name] = content
    size = sum(map(len, found.values()))
    before = sum(len(o) if isinstance(o, bytes) else o.stat().st_size for o in others)
    if size + before > KEPT_BYTES:
        raise InputError(
            "too many pictures to keep in this bundle",
            got=f"{size} bytes, beside {before} that are kept",
            expected=f"{KEPT_BYTES} bytes together",
            fix="leave --keep-pictures out: the class is learnt all the same; or make the pictures smaller first",
        )
    return found


def _content(source: Path | str | bytes | np.ndarray) -> tuple[bytes, str]:
    """Of a picture, and the suffix of its file."""
    if isinstance(source, np.ndarray):
        stream = io.BytesIO()
        Image.fromarray(source).save(stream, "PNG")
        return stream.getvalue(), "png"
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    with Picture(content) as picture:
        return content, _SUFFIXES.get(picture.format, picture.format.lower())
