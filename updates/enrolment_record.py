"""What a device has learnt itself: the names, features and kept pictures of a version, as its files hold them."""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..arrays import ArraySpec, read_npz
from ..artefacts.bundle import Bundle
from ..artefacts.layout import ENROLMENTS, PICTURES
from ..artefacts.manifest import Enrolment
from ..class_statistics import ClassStatistics
from ..decoder import Picture
from ..errors import InputError
from ..folders import hidden
from ..splits import DIGITS

MOST = 20_000
"pictures that may be enrolled in one bundle: their features are kept, 4 KB each"
KEPT_BYTES = 256 << 20
"of the pictures that are kept beside the enrolments of one bundle"
LONGEST = 200
"characters of a class's name"
LONGEST_FOLDER = 255
"bytes of a name, of most filesystems"
_SUFFIXES = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "HEIF": "heic"}
"of formats whose name is no suffix"
Source = Path | str | bytes | np.ndarray
"a picture: a file, its content, or a frame, uint8 RGB (H, W, 3)"


@dataclass(frozen=True)
class Enrolled:
    """All that a version has learnt on the device."""

    entries: tuple[Enrolment, ...]
    features: np.ndarray
    "float32 (N, D), the pictures of all entries in their order"
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    "name in the version -> the pictures that are kept, see Enrolment.pictures"

    @classmethod
    def of(cls, bundle: Bundle) -> Enrolled:
        """Read it from a version. Raises: InputError for a file that is not what its manifest says."""
        entries, width = bundle.manifest.enrolments, bundle.signature().outputs.get("features", (1, 0))[1]
        if not entries:
            return cls((), np.zeros((0, width), np.float32))
        wanted = {"features": ArraySpec("float32", (sum(e.images for e in entries), width), exact=True)}
        try:
            features = read_npz(bundle.read(ENROLMENTS), wanted, most=4 * MOST * width)["features"]
            return cls(entries, features, {n: bundle.path / n for entry in entries for n in entry.pictures})
        except ValueError as error:
            raise InputError(
                f"{bundle.path}: what was enrolled is not whole", got=str(error), fix="cdl-edge pack rollback BUNDLE"
            ) from error

    @property
    def names(self) -> list[str]:
        """Names of the enrolled classes, in the order in which they came."""
        return list(dict.fromkeys(entry.name for entry in self.entries))

    def of_class(self, name: str) -> np.ndarray:
        """float32 (n, D): the features of the pictures that a class was given here."""
        owners = np.repeat([entry.name for entry in self.entries], [entry.images for entry in self.entries])
        return self.features[owners == name] if len(owners) else self.features

    def plus(self, entry: Enrolment, features: np.ndarray) -> Enrolled:
        """The same with one more entry, none of whose pictures is kept. features: float32 (n, D)."""
        return replace(self, entries=(*self.entries, entry), features=np.concatenate([self.features, features]))

    def without(self, name: str) -> Enrolled:
        """The same without all pictures of a class."""
        rows = np.repeat([e.name != name for e in self.entries], [entry.images for entry in self.entries])
        entries = tuple(e for e in self.entries if e.name != name)
        left = {picture for entry in entries for picture in entry.pictures}
        return Enrolled(entries, self.features[rows], {n: c for n, c in self.files.items() if n in left})

    def renamed(self, old: str, new: str) -> Enrolled:
        """The same with another name for a class; its place among the classes stays."""
        return replace(self, entries=tuple(replace(e, name=new) if e.name == old else e for e in self.entries))

    def spelt_as(self, classes: Sequence[str]) -> Enrolled:
        """The same under the names of these classes, where they are the same but for how accents are written."""
        return replace(self, entries=tuple(replace(e, name=known_as(e.name, classes)) for e in self.entries))

    def joined(self, other: Enrolled) -> Enrolled:
        """These enrolments, then those of another device; the same pictures count once, under the name they have here.

        Pictures that either of the two has kept stay.
        """
        theirs = {x.tobytes(): entry for entry, x in other._parts()}
        entries, parts = [], [x for _, x in self._parts()]
        for entry, x in self._parts():
            if (same := theirs.pop(x.tobytes(), None)) is not None:
                kept, digests = entry.pictures or same.pictures, entry.digests or same.digests
                entry = replace(entry, pictures=kept, digests=digests)
            entries.append(entry)
        more = [(entry, x) for entry, x in other._parts() if x.tobytes() in theirs]
        entries += [entry for entry, _ in more]
        names = {picture for entry in entries for picture in entry.pictures}
        files = {name: content for name, content in {**other.files, **self.files}.items() if name in names}
        return Enrolled(tuple(entries), np.concatenate([self.features[:0], *parts, *(x for _, x in more)]), files)

    def _parts(self) -> list[tuple[Enrolment, np.ndarray]]:
        """Each entry with the features of its pictures."""
        ends = np.cumsum([entry.images for entry in self.entries], dtype=int)
        return list(zip(self.entries, np.split(self.features, ends[:-1]), strict=True)) if self.entries else []

    def bare(self) -> Enrolled:
        """The same without the pictures that are kept; what was learnt from them stays."""
        return Enrolled(tuple(replace(e, pictures=()) for e in self.entries), self.features)

    def added_to(self, workshop: ClassStatistics) -> ClassStatistics:
        """The statistics of the workshop's images and of these; new classes behind the others."""
        total = workshop
        for name in self.names:
            x = self.of_class(name)
            total = total + ClassStatistics.of(workshop.map, x, np.zeros(len(x), np.int64), (name,))
        return total


def check_name(name: str) -> None:
    """Raises: InputError for what cannot be the name of a class."""
    if not name or name != name.strip() or not name.isprintable() or len(name) > LONGEST or "\ufffd" in name:
        raise InputError(
            "this cannot be the name of a class",
            got=repr(name)[:LONGEST],
            expected=f"1 to {LONGEST} printable characters, no blank at either end",
        )


def known_as(name: str, classes: Sequence[str]) -> str:
    """The class of that name as it is spelt here, else the name: an accent may be a character of its own, or not.

    The two look the same, and file systems and keyboards differ in which one they give.
    """
    plain = unicodedata.normalize("NFC", name)
    return next((known for known in classes if unicodedata.normalize("NFC", known) == plain), plain)


def check_folder(name: str) -> None:
    """Raises: InputError for the name of a class that no folder of pictures can have."""
    too_long = len(name.encode("utf-8")) > LONGEST_FOLDER
    if PurePosixPath(name).name != name or name in ("..",) or hidden(name) or "\\" in name or too_long:
        raise InputError(
            f"class {name!r}: no folder of pictures can have this name",
            expected=f"a name without / and \\ that does not begin with a dot, {LONGEST_FOLDER} bytes at most",
            fix="give the class another one first: cdl-edge enrol rename BUNDLE OLD NEW",
        )


def kept_pictures(sources: Sequence[Source], others: Iterable[Path | bytes]) -> dict[str, bytes]:
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


def digest(source: Source) -> str:
    """DIGITS hex digits of a SHA-256 over a picture: a file's bytes, or a frame as the PNG that is kept of it."""
    content = _content(source)[0] if isinstance(source, np.ndarray) else source
    return hashlib.sha256(content if isinstance(content, bytes) else Path(content).read_bytes()).hexdigest()[:DIGITS]


def _content(source: Source) -> tuple[bytes, str]:
    """Of a picture, and the suffix of its file."""
    if isinstance(source, np.ndarray):
        stream = io.BytesIO()
        Image.fromarray(source).save(stream, "PNG")
        return stream.getvalue(), "png"
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    with Picture(content) as picture:
        return content, _SUFFIXES.get(picture.format, picture.format.lower())
