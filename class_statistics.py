"""Class statistics: for each class the number of its images and the sum of their features, and one second moment.

They are what a classifier head is made from in closed form (heads.py), without any image: adding a class, adding
pictures to a class and taking them out again are additions and subtractions in float64, exact to rounding and
independent of order. Numpy only: a device uses them too.

What they say about people's pictures: a mean of features is not a picture, but the statistics of a class of one picture
are that picture's features. Share a bundle's statistics as you would share the classifier.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .files import atomic_file

SCHEMA = 1
KINDS = ("plain", "unit", "random")
"what is done to features, see FeatureMap"
TOKENS = ("class", "kd")
"parts of features that are one token each"
DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    RuntimeError,  # also NotImplementedError and RecursionError
    zipfile.BadZipFile,
    zlib.error,
)
"what reading a damaged archive raises"


@dataclass(frozen=True)
class FeatureMap:
    """Which features the statistics are of: outputs of the network, and what is done to them."""

    parts: tuple[str, ...]
    """what is concatenated, in order: class, kd (tokens), patches (their mean), vertical, horizontal, diagonal (what
    differs between halves of the image, see train.tokens.pooling)"""
    width: int
    "of the concatenation, D"
    kind: str = "plain"
    "plain | unit (divided by the Euclidean norm) | random (random projection, then ReLU: RanPAC)"
    size: int = 0
    "columns of the random projection, L; 0 for the other kinds"
    seed: int = 0
    "of the random projection: one for all runs, so that their bundles share backbone.bin"
    token_weight: float = 1.0
    "factor of class and KD token in front of the random projection; what is pooled from patches has 1"

    @property
    def features(self) -> int:
        """Length of a feature vector, F."""
        return self.size if self.kind == "random" else self.width

    def projection(self) -> np.ndarray | None:
        """float32 (D, L), standard normal times `token_weight`, the same for the same seed everywhere.

        None for the other kinds.
        """
        if self.kind != "random":
            return None
        drawn = np.random.default_rng([self.seed, 0x4A9]).standard_normal((self.width, self.size), np.float32)
        if self.token_weight != 1:
            for part, rows in zip(self.parts, np.split(drawn, len(self.parts)), strict=True):
                rows *= self.token_weight if part in TOKENS else 1
        return drawn

    def apply(self, x: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, F) in float64."""
        x = np.asarray(x, np.float64)
        if self.kind == "unit":
            return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return np.maximum(x @ _projection(self), 0) if self.kind == "random" else x

    def to_json(self) -> dict[str, Any]:
        """The map as plain JSON values; a weight of 1 is left out, as releases before it had one wrote it."""
        weight = {} if self.token_weight == 1 else {"token_weight": self.token_weight}
        return {**{k: v for k, v in vars(self).items() if k != "token_weight"}, "parts": list(self.parts), **weight}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> FeatureMap:
        """The inverse of `to_json`. Raises: ValueError, KeyError or TypeError for anything else."""
        found = cls(**{**document, "parts": tuple(document["parts"])})
        numbers = (found.width, found.size, found.seed)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError(f"width, size and seed {numbers}")
        if not (isinstance(found.token_weight, float) and 0 < found.token_weight <= 1):
            raise ValueError(f"weight of tokens {found.token_weight!r}")
        if found.kind not in KINDS or found.features < 1 or not all(isinstance(p, str) for p in found.parts):
            raise ValueError(f"features {document}")
        return found


@lru_cache(maxsize=1)
def _projection(map: FeatureMap) -> np.ndarray:
    """Of the map that was applied last: drawing it takes longer than applying it to a few pictures."""
    drawn = map.projection()
    assert drawn is not None
    return drawn


@dataclass(frozen=True)
class ClassStatistics:
    """Counts, sums and products of the features of some classes, of length F. All arrays are float64 but the counts."""

    map: FeatureMap
    classes: tuple[str, ...]
    "names, C"
    counts: np.ndarray
    "int64 (C,)"
    sums: np.ndarray
    "(C, F), sum of the features of each class"
    moment: np.ndarray
    "(F, F), sum of x x^T over all images of all these classes"

    @classmethod
    def of(cls, map: FeatureMap, x: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> ClassStatistics:
        """x: (N, D) outputs of the network; labels: int (N,), positions in `classes`."""
        count = len(classes)
        sums, moment = np.zeros((count, map.features)), np.zeros((map.features, map.features))
        for start in range(0, len(x), 1024):  # random features of all images at once would not fit everywhere
            h, y = map.apply(x[start : start + 1024]), labels[start : start + 1024]
            np.add.at(sums, y, h)
            moment += h.T @ h
        return cls(map, tuple(classes), np.bincount(labels, minlength=count).astype(np.int64), sums, moment)

    @property
    def images(self) -> int:
        """All of them."""
        return int(self.counts.sum())

    @property
    def means(self) -> np.ndarray:
        """(C, F)."""
        return self.sums / np.maximum(self.counts, 1)[:, None]

    def scatter(self) -> np.ndarray:
        """(F, F): covariance within the classes, divided by the number of images."""
        means = self.means
        within = self.moment - (means * self.counts[:, None]).T @ means
        return (within + within.T) / (2 * max(1, self.images))

    def _check(self, other: ClassStatistics) -> None:
        if self.map != other.map:
            raise InputError(
                "class statistics of different features cannot be combined",
                got=str(other.map.to_json()),
                expected=str(self.map.to_json()),
            )

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        """The statistics of both sets of images; what both have is one class. Raises: InputError for other features."""
        self._check(other)
        names = [*self.classes, *(c for c in other.classes if c not in set(self.classes))]
        counts, sums = np.zeros(len(names), np.int64), np.zeros((len(names), self.map.features))
        for part in (self, other):
            rows = [names.index(c) for c in part.classes]
            counts[rows] += part.counts
            sums[rows] += part.sums
        return ClassStatistics(self.map, tuple(names), counts, sums, self.moment + other.moment)

    def __sub__(self, other: ClassStatistics) -> ClassStatistics:
        """Without the images of `other`; a class that has none left goes.

        Raises: InputError for other features, or for images that are not in these statistics.
        """
        self._check(other)
        counts, sums = self.counts.copy(), self.sums.copy()
        for i, name in enumerate(other.classes):
            held = self.counts[self.classes.index(name)] if name in self.classes else 0
            if other.counts[i] > held:
                raise InputError(
                    f"class {name!r} has fewer images than are to be taken out",
                    got=int(other.counts[i]),
                    expected=f"at most {int(held)}",
                )
            counts[self.classes.index(name)] -= other.counts[i]
            sums[self.classes.index(name)] -= other.sums[i]
        kept = np.flatnonzero(counts > 0)
        names = tuple(self.classes[i] for i in kept)
        return ClassStatistics(self.map, names, counts[kept], sums[kept], self.moment - other.moment)

    def ordered(self, classes: Sequence[str]) -> ClassStatistics:
        """The same with its classes in the order given. Raises: InputError where the names are others."""
        if sorted(classes) != sorted(self.classes):
            odd = sorted(set(classes) ^ set(self.classes))
            raise InputError("class statistics of other classes", got=", ".join(odd[:5]), expected="the same names")
        rows = [self.classes.index(c) for c in classes]
        return ClassStatistics(self.map, tuple(classes), self.counts[rows], self.sums[rows], self.moment)

    def save(self, path: Path) -> None:
        """Write an .npz atomically; the same statistics give the same bytes. Only a triangle of the moment is kept."""
        with atomic_file(path) as temporary, open(temporary, "wb") as stream:
            np.savez(
                stream,
                schema=np.array(SCHEMA),
                map=np.array(json.dumps(self.map.to_json(), sort_keys=True)),
                classes=np.array(self.classes, dtype=np.str_),
                counts=self.counts,
                sums=self.sums,
                moment=self.moment[np.triu_indices(len(self.moment))],
            )

    @classmethod
    def load(cls, path: Path) -> ClassStatistics:
        """The inverse of `save`. Raises: InputError when the file is not there or not one of ours."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["schema"]) > SCHEMA:
                    raise InputError(f"{path}: written by a newer cdl-edge", got=int(file["schema"]), expected=SCHEMA)
                map = FeatureMap.from_json(json.loads(str(file["map"])))
                names = tuple(str(c) for c in file["classes"])
                counts, sums, triangle = file["counts"], file["sums"], file["moment"]
                _check_arrays(map.features, names, counts, sums, triangle)
                moment, start = np.zeros((map.features, map.features)), 0
                for i in range(map.features):
                    row = triangle[start : start + map.features - i]
                    moment[i, i:] = moment[i:, i] = row
                    start += len(row)
                return cls(map, names, counts, sums, moment)
        except DAMAGED as error:
            raise InputError(
                f"{path}: no class statistics", got=" ".join(str(error).split()), expected="a file written by train"
            ) from error


def _check_arrays(
    features: int, names: Sequence[str], counts: np.ndarray, sums: np.ndarray, triangle: np.ndarray
) -> None:
    """Raises: ValueError for arrays of a file that are not what `save` writes. triangle: of the moment."""
    shapes = {"counts": (len(names),), "sums": (len(names), features), "moment": (features * (features + 1) // 2,)}
    for (name, shape), array in zip(shapes.items(), (counts, sums, triangle), strict=True):
        kind = np.int64 if name == "counts" else np.float64
        if array.shape != shape or array.dtype != kind:
            raise ValueError(f"{name} {array.dtype} {array.shape} in place of {np.dtype(kind)} {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} with a value that is no number")
    if len(set(names)) != len(names) or (counts < 0).any():
        raise ValueError("a class twice, or with fewer than no images")


def merged(parts: Iterable[ClassStatistics]) -> ClassStatistics:
    """The sum of several, at least one."""
    first, *rest = parts
    for part in rest:
        first = first + part
    return first
