"""Images with their labels: parts of them, their hashes, their pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .errors import InputError
from .heartbeat import at
from .images import Preprocessing, UnreadableImage

DIGITS = 16
"hex digits of a hash of a class or of an image: 64 bits tell accidents apart, not attacks"
UNREADABLE = "unreadable"
"in place of the hash of a file that cannot be read: told, and left out, when it is decoded"
SAMPLES = 2
"images of each class that a fingerprint names one by one"
_GLANCE = Preprocessing(32, 32)
"decodes as little of a file as shows that it is readable"


@dataclass(frozen=True)
class Decoded:
    """Pixels in memory, ready for a backbone."""

    pixels: np.ndarray
    "uint8 (N, S, S, 3)"
    labels: np.ndarray
    "int64 (N,)"
    skipped: tuple[str, ...]
    "one line for each image that could not be read"
    read: np.ndarray
    "int64 (N,): where each of them stands in the split"


@dataclass(frozen=True)
class Split:
    """Images (paths, or uint8 arrays of one shape) with their labels."""

    items: Sequence[Path] | np.ndarray
    "paths, or uint8 (N, H, W, 3)"
    labels: np.ndarray
    "int64 (N,), indices into Dataset.classes"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Split:
        """The images at `index` (int64 (K,)), in that order."""
        items = self.items[index] if isinstance(self.items, np.ndarray) else [self.items[int(i)] for i in index]
        return Split(items, self.labels[index])

    def of_classes(self, classes: Sequence[int]) -> Split:
        """The images of some classes, in their order here."""
        return self.take(np.flatnonzero(np.isin(self.labels, np.asarray(classes))))

    def limited(self, per_class: int, seed: int) -> Split:
        """Keep `per_class` images of each class at most, drawn by `seed`, in their order here."""
        rng = np.random.default_rng([seed, 0x11317])
        keep = [rng.permutation(np.flatnonzero(self.labels == c))[:per_class] for c in np.unique(self.labels)]
        return self.take(np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *keep])))

    @cached_property
    def digests(self) -> dict[str, list[str]]:
        """SHA-256 of a file's bytes -> its paths here; empty for arrays. Every file is read whole, once."""

        def hash_of(item: Path) -> str:
            try:
                return hashlib.sha256(item.read_bytes()).hexdigest()
            except OSError:
                return UNREADABLE

        found: dict[str, list[str]] = {}
        if isinstance(self.items, np.ndarray):
            return found
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            hashed = pool.map(hash_of, self.items, chunksize=64)
            for count, (path, digest) in enumerate(zip(self.items, hashed, strict=True), 1):
                found.setdefault(digest, []).append(str(path))
                at(f"fingerprint of the pictures: {count:,} of {len(self):,}")
        return found

    def digest(self, index: int) -> str:
        """DIGITS hex digits of a SHA-256 over one image: a file's bytes, or pixels. Raises: OSError."""
        item = self.items[index]
        content = item.tobytes() if isinstance(item, np.ndarray) else Path(item).read_bytes()
        return hashlib.sha256(content).hexdigest()[:DIGITS]

    def hashes(self, classes: Sequence[str]) -> dict[str, str]:
        """Hash each class that has images here: DIGITS hex digits of a SHA-256 over the names and bytes of its files.

        Every file is read whole: 20,000 files of 2 KB took 1.7 s, large ones go at 185 MB/s a core (measured
        2026-11-27, a busy machine without SHA instructions); reading and decoding them takes several times as long.
        """

        found = {}
        lines: list[str] = []
        if not isinstance(self.items, np.ndarray):
            of = {path: digest for digest, paths in self.digests.items() for path in paths}
            lines = [f"{p.parent.name}/{p.name} {of[str(p)]}" for p in self.items]
        for label in np.unique(self.labels).tolist():
            index = np.flatnonzero(self.labels == label)
            if isinstance(self.items, np.ndarray):
                content = np.ascontiguousarray(self.items[index]).tobytes()
            else:
                content = "\n".join(sorted(lines[int(i)] for i in index)).encode("utf-8", "surrogateescape")
            found[classes[label]] = hashlib.sha256(content).hexdigest()[:DIGITS]
        return found

    @property
    def samples(self) -> tuple[str, ...]:
        """DIGITS hex digits of a SHA-256 over the bytes of SAMPLES files of each class; none of arrays."""
        readable = {k: paths for k, paths in self.digests.items() if k != UNREADABLE}
        of = {path: digest[:DIGITS] for digest, paths in readable.items() for path in paths}
        found: list[str] = []
        for label in np.unique(self.labels).tolist() if of else ():
            paths = (str(self.items[int(i)]) for i in np.flatnonzero(self.labels == label))
            found += sorted(of[path] for path in paths if path in of)[:SAMPLES]
        return tuple(found)

    def check_readable(self, classes: Sequence[str]) -> None:
        """Look for one readable image of each class, before hours of work are spent on the classes in front of it.

        classes: names, for the message. Raises: InputError for a class with nothing but unreadable files.
        """
        if isinstance(self.items, np.ndarray):
            return
        for label in np.unique(self.labels).tolist():
            first = None
            for index in np.flatnonzero(self.labels == label):
                try:
                    _GLANCE.read(self.items[int(index)])
                    break
                except UnreadableImage as error:
                    first = first or " ".join(str(error).split())
            else:
                raise InputError(
                    f"class {classes[label]!r} has no readable image",
                    got=first,
                    expected="at least one readable image a class",
                    fix="replace the files or remove the class folder",
                )

    def decode(self, preprocessing: Preprocessing, sampled: bool = False) -> Decoded:
        """Read every image; an unreadable one is named and left out.

        sampled: these are some images of a larger split, in which a class may have others.
        Raises: InputError when a class loses all of its images, unless `sampled`; when no image is left.
        """

        def one(item: Path | np.ndarray) -> np.ndarray | str:
            try:
                return preprocessing.read(item)
            except UnreadableImage as error:
                return " ".join(str(error).split())

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            results = []
            for result in pool.map(one, self.items, chunksize=64):
                results.append(result)
                at(f"reading pictures: {len(results):,} of {len(self):,}")
        good = [i for i, r in enumerate(results) if not isinstance(r, str)]
        skipped = tuple(r for r in results if isinstance(r, str))
        lost = sorted(set(self.labels.tolist()) - set(self.labels[good].tolist()))
        if lost and (not sampled or not good):
            raise InputError(
                f"no readable image is left of {len(lost)} class(es)",
                # The first file of a lost class: its path says which class it is.
                got=next(str(r) for r, label in zip(results, self.labels, strict=True) if label == lost[0]),
                expected="at least one readable image a class",
                fix="replace the files or remove the class folder",
            )
        size = preprocessing.size
        pixels = np.stack([r for r in results if not isinstance(r, str)]) if good else np.zeros((0, size, size, 3))
        return Decoded(pixels.astype(np.uint8, copy=False), self.labels[good], skipped, np.asarray(good, np.int64))


def joined(splits: Sequence[Split]) -> Split:
    """All of them as one, in that order."""
    labels = np.concatenate([s.labels for s in splits]) if splits else np.zeros(0, dtype=np.int64)
    if splits and all(isinstance(s.items, np.ndarray) for s in splits):
        return Split(np.concatenate([np.asarray(s.items) for s in splits]), labels)
    return Split([item for s in splits for item in s.items], labels)


def deeper(parts: Sequence[Split | None], classes: Sequence[str]) -> str:
    """Say how many pictures lie in folders inside a class folder: they count as that class, wanted or not."""
    below = sorted(
        f"{classes[label]}/{path.parent.name}"
        for part in parts
        if part is not None and not isinstance(part.items, np.ndarray)
        for path, label in zip(part.items, part.labels.tolist(), strict=True)
        if path.parent.name != classes[label]
    )
    return f"; {len(below)} in folders inside class folders ({below[0]}/ ...), which count" if below else ""


def copies(train: Split, val: Split) -> str | None:
    """A warning where validation pictures are training pictures too, to the byte; None where none is."""
    both = train.digests.keys() & val.digests.keys() - {UNREADABLE}
    if not both:
        return None
    found = sorted(path for digest in both for path in val.digests[digest])
    first = "/".join(Path(found[0]).parts[-2:])
    return (
        f"warning: {len(found)} of the {len(val)} validation pictures are training pictures too ({first}"
        f"{' ...' if len(found) > 1 else ''}): they make the accuracy too good; remove the copies"
    )
