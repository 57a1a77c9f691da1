"""What `profile` measured: the document that its --json prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .typed import MalformedField, parse


@dataclass(frozen=True)
class ProfileRecord:
    """Latency of one bundle on one machine; all times in milliseconds."""

    end_to_end_ms: Mapping[str, float]
    "statistics by name: n, mean, std, p50, p99 and others"
    flags: tuple[str, ...] = ()
    "what makes the numbers doubtful"
    backend: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    "under which conditions it was measured"
    definitions: Mapping[str, str] = field(default_factory=dict)
    trace_ms: tuple[float, ...] | None = None
    "end to end of every call, in order"
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    "statistics of each stage, end_to_end among them, by the stage's name"
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, document: object) -> ProfileRecord:
        """Read it. Raises: InputError for what is no document of `profile`."""
        made = parse(cls, document, "profile")
        stages = {
            key.removesuffix("_ms"): parse(_Stage, {"numbers": value}, "profile", key).numbers
            for key, value in made.document.items()
            if key.endswith("_ms") and isinstance(value, dict)
        }
        object.__setattr__(made, "stages", stages)
        return made

    def check(self) -> None:
        """Both percentiles are there, and times are not negative. Raises: MalformedField."""
        for name in ("p50", "p99"):
            if name not in self.end_to_end_ms:
                raise MalformedField(f"end_to_end_ms.{name}", None, "a finite number")
        if self.trace_ms is not None and (not self.trace_ms or min(self.trace_ms) < 0):
            expected = "milliseconds, not negative, of at least one call; or no such key"
            raise MalformedField("trace_ms", list(self.trace_ms), expected)


@dataclass(frozen=True)
class _Stage:
    numbers: Mapping[str, float]
