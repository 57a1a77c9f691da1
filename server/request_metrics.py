"""Counts and times of the server, as Prometheus reads them.

Text format: https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4).
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"upper bounds of the latency histogram, in seconds"
RECENT = 1000
"answered predictions whose times are kept for the percentiles of the page"
Labels = tuple[tuple[str, str], ...]


class RequestMetrics:
    """What happened since the start; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[Labels] = Counter()
        self._errors: Counter[Labels] = Counter()
        self._swaps: Counter[Labels] = Counter({(("result", "done"),): 0, (("result", "failed"),): 0})
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._recent_ms: deque[float] = deque(maxlen=RECENT)
        self._v2 = dict.fromkeys(("success", "fail", "compute_input", "compute_infer", "compute_output"), (0, 0))
        self._v2_images, self._v2_last = 0, 0
        self.in_flight = 0

    def begin(self) -> None:
        """Count a request that came in."""
        with self._lock:
            self.in_flight += 1

    def end(self, endpoint: str, status: int, seconds: float) -> None:
        """It was answered; endpoint: "none" when no endpoint has its path."""
        with self._lock:
            self.in_flight -= 1
            self._requests[(("endpoint", endpoint), ("status", str(status)))] += 1
            buckets = self._buckets.setdefault(endpoint, [0] * (len(BUCKETS_S) + 1))
            buckets[bisect_left(BUCKETS_S, seconds)] += 1
            self._seconds[endpoint] = self._seconds.get(endpoint, 0.0) + seconds

    def predicted(self, milliseconds: float) -> None:
        """A prediction was answered after this long, from the last byte of the request on."""
        with self._lock:
            self._recent_ms.append(milliseconds)

    def asked(self, done: bool, seconds: float) -> None:
        """A request of the Open Inference Protocol was answered, or was not."""
        with self._lock:
            self._add("success" if done else "fail", seconds)

    def inferred(self, images: int, seconds: Mapping[str, float]) -> None:
        """The engine was called for one of them. seconds: of "input", "infer" and "output"."""
        with self._lock:
            self._v2_images += images
            self._v2_last = int(time.time() * 1e3)
            for name, value in seconds.items():
                self._add(f"compute_{name}", value)

    def _add(self, name: str, seconds: float) -> None:
        count, total = self._v2[name]
        self._v2[name] = (count + 1, total + int(seconds * 1e9))

    def statistics(self) -> dict[str, Any]:
        """Counts of the Open Inference Protocol since the start, in the form of Triton's statistics extension."""
        with self._lock:
            found = {name: {"count": count, "ns": total} for name, (count, total) in self._v2.items()}
            last, images = self._v2_last, self._v2_images
        inside = sum(v["ns"] for name, v in found.items() if name.startswith("compute_"))
        waited = {"count": found["success"]["count"], "ns": max(0, found["success"]["ns"] - inside)}
        return {
            "last_inference": last,
            "inference_count": images,
            "execution_count": found["compute_infer"]["count"],
            "inference_stats": {**found, "queue": waited},
            "batch_stats": [],
        }

    def error(self, kind: str) -> None:
        """Count a request that was refused, or failed."""
        with self._lock:
            self._errors[(("kind", kind),)] += 1

    def swap(self, done: bool) -> None:
        """Count an exchange of versions: done, or refused because the new one proved unfit."""
        with self._lock:
            self._swaps[(("result", "done" if done else "failed"),)] += 1

    def latency(self) -> dict[str, float | int | None]:
        """{"n", "p50_ms", "p99_ms"} of the last RECENT predictions; None before the first."""
        with self._lock:
            recent = np.array(self._recent_ms)
        p50, p99 = (round(float(v), 2) for v in np.percentile(recent, [50, 99])) if len(recent) else (None, None)
        return {"n": len(recent), "p50_ms": p50, "p99_ms": p99}

    def text(self, health: Mapping[str, Any], info: Mapping[str, object]) -> str:
        """The page at /metrics. health: see `LiveModel.health`; info: labels of the constant cdl_edge_info."""
        with self._lock:
            lines = _metric("cdl_edge_info", "gauge", "What answers.", {tuple((k, str(v)) for k, v in info.items()): 1})
            lines += _metric("cdl_edge_requests_total", "counter", "Requests answered.", self._requests)
            lines += _metric("cdl_edge_errors_total", "counter", "Requests refused or failed, by kind.", self._errors)
            lines += _metric("cdl_edge_swaps_total", "counter", "Exchanges of the bundle.", self._swaps)
            lines += _metric("cdl_edge_in_flight", "gauge", "Requests being answered.", {(): self.in_flight})
            lines += self._histogram()
        lines += _metric("cdl_edge_queue", "gauge", "Calls waiting or running.", {(): health["in_flight"]})
        lines += _metric("cdl_edge_queue_capacity", "gauge", "Calls accepted at a time.", {(): health["capacity"]})
        lines += _metric("cdl_edge_healthy", "gauge", "1: no call is stuck.", {(): int(health["status"] == "ok")})
        lines += _metric(
            "cdl_edge_longest_call_seconds", "gauge", "Oldest running call.", {(): health["longest_call_s"]}
        )
        if (resident := resident_bytes()) is not None:
            lines += _metric("process_resident_memory_bytes", "gauge", "Memory held.", {(): resident})
        return "\n".join(lines) + "\n"

    def _histogram(self) -> list[str]:
        name = "cdl_edge_request_seconds"
        lines = [f"# HELP {name} Time to answer, the request's body included.", f"# TYPE {name} histogram"]
        for endpoint, buckets in self._buckets.items():
            total = 0
            for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), buckets, strict=True):
                total += count
                lines.append(f"{name}_bucket{_labels((('endpoint', endpoint), ('le', bound)))} {total}")
            label = _labels((("endpoint", endpoint),))
            lines += [f"{name}_sum{label} {self._seconds[endpoint]:.6f}", f"{name}_count{label} {total}"]
        return lines


def resident_bytes() -> int | None:
    """Memory that this process holds now; None outside of Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    import resource

    return pages * resource.getpagesize()


def _metric(name: str, kind: str, text: str, values: Mapping[Labels, float]) -> list[str]:
    head = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    return head + [f"{name}{_labels(labels)} {value}" for labels, value in values.items()]


def _labels(labels: Labels) -> str:
    escaped = ((k, v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for k, v in labels)
    inside = ",".join(f'{k}="{v}"' for k, v in escaped)
    return f"{{{inside}}}" if inside else ""
