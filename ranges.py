"""Ranges of a student's tensors, task by task: what INT8 needs to know of images that are gone. numpy only.

A histogram's bins are a power of two wide and lie on a grid through zero; both follow from the minimum and the maximum
alone. Histograms of parts therefore merge into exactly the histogram of the whole, whatever the order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .arrays import MOST_BYTES, read_npz
from .errors import InputError
from .files import atomic_file

SCHEMA = 1
BINS = 1024
"of a histogram; 512 at least are between its ends, unless the values hardly differ"
FINEST = -24
"bins are 2 ** FINEST wide at least"
TAILS = (0.001, 0.999)
"shares of the values below the two points whose movement is drift; minimum and maximum are too noisy for it"
CARRIED = 0.5
"""exponent of what drift says of other images: it is seen on the images that are being learnt, which move further.
Slope of what earlier tasks' images really did on it, log to log (photographs, ten tasks, KDP, 2026-11-21): 0.46 CODA,
0.60 L2P, 0.72 DualPrompt, 0.90 APT. 0.5 makes the tails of all four better than no drift does; 1 does not"""


def bin_exponent(low: float, high: float) -> int:
    """e of the finest bins, 2 ** e wide, of which BINS hold everything from `low` to `high`."""
    # Finer than float32's spacing there would be nothing to tell apart.
    exponent = max(FINEST, math.frexp(max(abs(low), abs(high)))[1] - 24)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent


def bin_grid(low: float, high: float) -> tuple[float, int]:
    """Width of these bins, and the index of the first: it starts at index * width."""
    exponent = bin_exponent(low, high)
    return math.ldexp(1.0, exponent), math.floor(math.ldexp(low, -exponent))


@dataclass(frozen=True)
class Histogram:
    """How often which values occur; minimum and maximum are exact."""

    low: float
    "the smallest value"
    high: float
    "the largest"
    counts: np.ndarray
    "int64 (BINS,)"

    @classmethod
    def of(cls, values: np.ndarray) -> Histogram:
        """Count finite values, at least one, float32 (...)."""
        low, high = float(values.min()), float(values.max())
        width, first = bin_grid(low, high)
        index = np.floor(values.ravel() / width).astype(np.int64) - first
        return cls(low, high, np.bincount(index, minlength=BINS))

    @property
    def width(self) -> float:
        """Width of one bin."""
        return bin_grid(self.low, self.high)[0]

    @property
    def first(self) -> int:
        """The first bin starts at first * width."""
        return bin_grid(self.low, self.high)[1]

    @property
    def edges(self) -> np.ndarray:
        """Edges of the bins, float64 (BINS + 1,); values lie between `low` and `high` only."""
        width, first = bin_grid(self.low, self.high)
        edges: np.ndarray = (first + np.arange(BINS + 1)) * width
        return edges

    @property
    def values(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    def percentile(self, share: float) -> float:
        """The value that `share` (0 to 1) of the values are below; within a bin as if they were spread evenly."""
        below = np.concatenate([[0], np.cumsum(self.counts)])
        target = share * below[-1]
        i = min(int(np.searchsorted(below, target, side="right")) - 1, int(np.flatnonzero(self.counts)[-1]))
        left, right = np.clip(self.edges[i : i + 2], self.low, self.high)
        return float(left + (right - left) * (target - below[i]) / max(1, self.counts[i]))

    def scaled(self, low: float, high: float) -> Histogram:
        """The histogram of negative values times `low` and others times `high`, both > 0; as many values as before."""
        ends = [value * (low if value < 0 else high) for value in (self.low, self.high)]
        edges = Histogram(ends[0], ends[1], self.counts).edges
        # How many values lie below each new edge: as many as below the point that was moved there.
        origins = np.where(edges < 0, edges / low, edges / high)
        below = np.concatenate([[0], np.cumsum(self.counts)])
        cumulated = np.rint(np.interp(origins, np.clip(self.edges, self.low, self.high), below)).astype(np.int64)
        cumulated[0], cumulated[edges > ends[1]] = 0, below[-1]
        return Histogram(ends[0], ends[1], np.diff(cumulated))


def merge(parts: Sequence[Histogram]) -> Histogram:
    """The histogram of all values together: exactly `Histogram.of` them, where the parts are."""
    low, high = min(p.low for p in parts), max(p.high for p in parts)
    exponent, first = bin_exponent(low, high), bin_grid(low, high)[1]
    counts = np.zeros(BINS, np.int64)
    for part in parts:
        filled = np.flatnonzero(part.counts)
        index = (part.first + filled) >> (exponent - bin_exponent(part.low, part.high))
        np.add.at(counts, index - first, part.counts[filled])
    return Histogram(low, high, counts)


@dataclass(frozen=True)
class TensorRange:
    """What is kept of one tensor (..., D)."""

    histogram: Histogram
    channels: np.ndarray | None = None
    "float32 (2, D), minimum and maximum of each channel; behind a LayerNorm only"

    def scaled(self, low: float, high: float) -> TensorRange:
        """The range of the scaled tensor, see Histogram.scaled."""
        channels = self.channels
        if channels is not None:
            channels = np.where(channels < 0, channels * low, channels * high).astype(np.float32)
        return TensorRange(self.histogram.scaled(low, high), channels)


def merge_tensors(parts: Sequence[TensorRange]) -> TensorRange:
    """Merge the ranges of one tensor over several sets of images."""
    channels = [p.channels for p in parts if p.channels is not None]
    stacked = np.stack([np.min([c[0] for c in channels], 0), np.max([c[1] for c in channels], 0)]) if channels else None
    return TensorRange(merge([p.histogram for p in parts]), stacked)


@dataclass(frozen=True)
class TaskRanges:
    """Ranges of the tensors over one task's images, in the student as it was when it had learnt the task."""

    images: int
    "how many were looked at"
    tensors: Mapping[str, TensorRange]
    "`{query,prompted}.blocks.{i}.{qkv,proj,fc1,fc2}`: the input of that Linear; every task has the same"
    drift: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    "tensor -> how far learning this task moved the two ends: after / before, of `drift`; absent: not at all"


def drift(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    """after / before of the low and of the high TAILS of a tensor; 1 where there is no ratio to speak of."""
    low, high = ((a / b if a * b > 0 else 1.0) for b, a in zip(before, after, strict=True))
    return low, high


def tails(histogram: Histogram) -> tuple[float, float]:
    """The values at TAILS."""
    return histogram.percentile(TAILS[0]), histogram.percentile(TAILS[1])


@dataclass(frozen=True)
class Ranges:
    """Ranges of the tensors of all tasks, in the order they were learnt."""

    tasks: tuple[TaskRanges, ...] = ()

    def merged(self, drift: bool = True) -> dict[str, TensorRange]:
        """Each tensor over the images of all tasks, as the last student would show it.

        drift: multiply the negative and the positive values of task t by prod_{s > t} drift_s ** CARRIED.
        """
        found = {}
        for name in self.tasks[0].tensors:
            parts, low, high = [], 1.0, 1.0
            for task in reversed(self.tasks):
                parts.append(task.tensors[name].scaled(low, high) if drift else task.tensors[name])
                moved = task.drift.get(name, (1.0, 1.0))
                low, high = low * moved[0] ** CARRIED, high * moved[1] ** CARRIED
            found[name] = merge_tensors(parts)
        return found

    def save(self, path: Path) -> None:
        """Write ranges.npz atomically; the same ranges give the same bytes."""
        names = list(self.tasks[0].tensors)
        ranges = [[task.tensors[n] for n in names] for task in self.tasks]
        channelled = [n for n in names if self.tasks[0].tensors[n].channels is not None]
        with atomic_file(path) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(
                stream,
                schema=np.array(SCHEMA),
                names=np.array(names),
                images=np.array([task.images for task in self.tasks]),
                counts=np.array([[r.histogram.counts for r in row] for row in ranges]),
                low=np.array([[r.histogram.low for r in row] for row in ranges], np.float32),
                high=np.array([[r.histogram.high for r in row] for row in ranges], np.float32),
                drift=np.array([[task.drift.get(n, (1.0, 1.0)) for n in names] for task in self.tasks]),
                channel_names=np.array(channelled),
                channels=np.array([[task.tensors[n].channels for n in channelled] for task in self.tasks]),
            )

    @classmethod
    def load(cls, path: Path) -> Ranges:
        """The inverse of `save`. Raises: InputError when the file is not there or not one of ours."""
        try:
            with open(path, "rb") as stream:
                stored = read_npz(stream.read(MOST_BYTES))
            if stored["schema"] > SCHEMA:
                raise InputError(
                    f"{path}: written by a newer cdl-edge", got=int(stored["schema"]), expected=SCHEMA, fix="upgrade"
                )
            return cls(tuple(_task(stored, t) for t in range(len(stored["images"]))))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{path}: no ranges kept while learning",
                got=" ".join(str(error).split()),
                expected="ranges.npz, written by train",
                fix="train with --range-images above 0",
            ) from error


def _task(stored: Mapping[str, np.ndarray], task: int) -> TaskRanges:
    names, channelled = stored["names"].tolist(), stored["channel_names"].tolist()
    channels = dict(zip(channelled, stored["channels"][task], strict=True))
    ends = zip(stored["low"][task].tolist(), stored["high"][task].tolist(), stored["counts"][task], strict=True)
    tensors = {
        name: TensorRange(Histogram(low, high, counts), channels.get(name))
        for name, (low, high, counts) in zip(names, ends, strict=True)
    }
    moved = {n: (low, high) for n, (low, high) in zip(names, stored["drift"][task].tolist(), strict=True)}
    return TaskRanges(int(stored["images"][task]), tensors, moved)
