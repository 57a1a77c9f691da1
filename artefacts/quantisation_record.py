"""The manifest's "quantisation": what `calibrate` did and measured, for every scheme of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .layout import SCHEMES_KEY
from .typed import MalformedField


@dataclass(frozen=True)
class PerTask:
    """Numbers of each task, None where nothing was measured, and their average."""

    per_task: tuple[float | None, ...]

    def check(self) -> None:
        """Check that at least one task was measured. Raises: MalformedField."""
        if all(value is None for value in self.per_task):
            raise MalformedField("per_task", list(self.per_task), "numbers or null, not all null")


@dataclass(frozen=True)
class SideRecord(PerTask):
    """The student in one precision, on the validation images."""

    average_accuracy: float
    "%"
    confidence: float
    "mean probability of the answer"
    calibration_error: float
    "in points"


@dataclass(frozen=True)
class DropRecord(PerTask):
    """Points of accuracy lost against fp32."""

    average: float


@dataclass(frozen=True)
class GateRecord:
    """The gate's verdict."""

    verdict: str
    unsure: tuple[str, ...] = ()
    "a line for each comparison that so few images cannot decide"


@dataclass(frozen=True)
class SchemeRecord:
    """One scheme of 8 bits, such as int8-x86."""

    agreement: float
    "% of the images with fp32's answer"
    max_abs_error: float
    "of a logit"
    layers_int8: int
    images: int
    runtimes: str | None = None
    opset: int | None = None
    layers_float: tuple[str, ...] = ()
    sensitivity: Mapping[str, float] | None = None
    "layer -> how far the answers move when it alone is in 8 bits; None: no search was needed"
    shortfall: str | None = None
    "why this scheme is not to be recommended; None: it may be"
    gate: GateRecord | None = None
    before: SideRecord | None = None
    after: SideRecord | None = None
    drop: DropRecord | None = None
    quantisation_forgetting: float | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def measured(self) -> bool:
        """Whether there were labelled images."""
        return self.before is not None and self.after is not None

    def check(self) -> None:
        """What was measured was compared. Raises: MalformedField."""
        if self.measured and self.drop is None:
            raise MalformedField("drop", None, "an object")


@dataclass(frozen=True)
class LatencyRecord:
    """One backend in one precision, measured in turns with the others."""

    backend: str
    precision: str
    compute_ms: float
    ratio: float
    "to the first candidate's time"

    def check(self) -> None:
        """Times are above 0. Raises: MalformedField."""
        for name in ("compute_ms", "ratio"):
            if getattr(self, name) <= 0:
                raise MalformedField(name, getattr(self, name), "a number above 0")


@dataclass(frozen=True)
class RefusalRecord:
    """What was faster than the recommended precision, and why it is not recommended."""

    backend: str
    precision: str
    reason: str


@dataclass(frozen=True)
class RangesRecord:
    """Where the ranges of the tensors came from."""

    kept_tasks: int = 0
    images: int = 0
    tasks_with_images: tuple[int, ...] = ()


@dataclass(frozen=True)
class Quantisation:
    """All schemes of one calibration."""

    method: str | None = None
    smooth: float | None = None
    max_drop: float | None = None
    ranges: RangesRecord = RangesRecord()
    schemes: Mapping[str, SchemeRecord] = field(default_factory=dict, metadata={"key": SCHEMES_KEY})
    "by name"
    definitions: Mapping[str, str] = field(default_factory=dict)
    latency: tuple[LatencyRecord, ...] = ()
    recommended: Mapping[str, str] = field(default_factory=dict)
    "backend and precision"
    refused: tuple[RefusalRecord, ...] = ()
