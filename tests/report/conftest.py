"""A run, a profile and a bundle to report on, and a reader of the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdl_edge.artefacts.bundle import write_bundle

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


def make_side(rows: list[list[float]]) -> dict[str, Any]:
    tasks = len(rows)
    after = [sum(r) / len(r) for r in rows]
    return {
        "average_accuracy": after[-1],
        "forgetting": 4.25,
        "incremental_accuracy": sum(after) / tasks,
        "matrix": [r + [None] * (tasks - len(r)) for r in rows],
        "accuracy_after_task": after,
        "forgetting_after_task": [0.0, 2.125, 4.25][:tasks],
        "seconds": [12.5] * tasks,
        "loss": [[1.0]] * tasks,
    }


@pytest.fixture
def metrics() -> dict[str, Any]:
    return {
        "schema": 1,
        "config": {
            "data": "folder:/data/insects & more",
            "teacher": "builtin:teacher",
            "student": "builtin:student",
            "learner": "coda",
            "distill": "kdp",
            "tasks": 3,
            "epochs": 20,
            "seed": 7,
            "limit_per_class": None,
        },
        "classes": ["bee", "wasp", HOSTILE, "ant", "moth", '" onload="alert(2)'],
        "tasks": [[0, 1], [2, 3], [4, 5]],
        "student": make_side([[91.23], [85.61, 88.44], [81.17, 79.92, 90.38]]),
        "teacher": make_side([[95.71], [92.33, 93.06], [90.54, 89.85, 94.49]]),
        "seconds": 3725.0,
        "skipped": [f"/data/{HOSTILE}.jpg: not a readable image"],
        "definitions": {"matrix": "row i, column j: accuracy", "forgetting": "mean drop in points"},
        "backbones": {
            "student": {"source": "builtin:student", "identity": "f" * 64, "width": 192, "depth": 12},
            "teacher": {"source": "builtin:teacher", "identity": "e" * 64, "width": 384, "depth": 12},
        },
        "device": "cpu",
        "versions": {"cdl-edge": "0.1.0", "torch": "2.15.0"},
    }


@pytest.fixture
def profile() -> dict[str, Any]:
    trace = 20 + np.random.default_rng(0).gamma(4, 1, 500)
    trace[17] = 400.0

    def statistics(values: np.ndarray) -> dict[str, float]:
        p50, p90, p99 = (float(v) for v in np.percentile(values, [50, 90, 99]))
        mean, std = float(values.mean()), float(values.std())
        return {"n": len(values), "mean": mean, "std": std, "cv": std / mean, "p50": p50, "p90": p90, "p99": p99}

    return {
        "end_to_end_ms": statistics(trace),
        "preprocess_ms": statistics(trace * 0.2),
        "compute_ms": statistics(trace * 0.8),
        "load_ms": 123.0,
        "backend": "onnxruntime",
        "flags": ["unstable", "a flag of tomorrow"],
        "context": {"threads": 1, "cpu": "A processor", "board": None, "peak_rss_bytes": 250_000_000},
        "trace_ms": trace.tolist(),
    }


def write_run(folder: Path, document: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return folder


def bundle_of(folder: Path, metrics: dict[str, Any], **changes: Any) -> Path:
    classes = metrics["classes"]
    manifest = {
        "name": "insects",
        "created": "2026-11-21T04:31:07Z",
        "classes": classes,
        "tasks": metrics["tasks"],
        "input": {
            "name": "images",
            "shape": [1, 32, 32, 3],
            "layout": "NHWC",
            "dtype": "uint8",
            "dynamic_batch": False,
            "preprocessing": {
                "size": 32,
                "resize": 32,
                "interpolation": "bicubic",
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
            },
            "normalisation": "in graph",
        },
        "outputs": {"logits": [1, len(classes)]},
        "learner": "coda",
        "distiller": "kdp",
        "selection": {"kind": "none"},
        "backbone": {"source": "builtin:student", "identity": "f" * 64, "width": 192, "depth": 12, "heads": 3},
        "opset": 23,
        "precision": "fp32",
        "quantisation": None,
        "graphs": {"student": "student.onnx"},
        "accuracy": {"average_accuracy": 83.82, "forgetting": 4.25, "per_task": [81.17, 79.92, 90.38], "images": 1234},
        "parity": {
            "max_abs_error": 3.1e-6,
            "mean_abs_error": 4e-7,
            "images": 64,
            "tolerance": 1e-4,
            "top1_agreement": 98.4375,
        },
        "training": metrics,
        "versions": {"cdl-edge": "0.1.0", "onnx": "1.23.0"},
    }
    files: dict[str, Path | bytes] = {"student.onnx": b"graph" * 20, "backbone.bin": b"x" * 2_000_000}
    write_bundle(folder, {**manifest, **changes}, files)
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on an element that is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def sections(self) -> set[str | None]:
        return {attrs["id"] for tag, attrs in self.tags if tag == "section"}


@pytest.fixture(scope="session")
def side() -> Callable[..., dict[str, Any]]:
    """`make_side(rows)`: one side of metrics.json."""
    return make_side


@pytest.fixture(scope="session")
def save_run() -> Callable[..., Path]:
    """`write_run(folder, document)`."""
    return write_run


@pytest.fixture(scope="session")
def save_bundle() -> Callable[..., Path]:
    """`bundle_of(folder, metrics, **changes)`; changes are fields of the manifest."""
    return bundle_of


@pytest.fixture(scope="session")
def read_page() -> Callable[[Path], Page]:
    """`Page(path)`."""
    return Page


@pytest.fixture(scope="session")
def hostile() -> str:
    """A class name that is markup."""
    return HOSTILE


@pytest.fixture
def quantisation() -> dict[str, Any]:
    """What `calibrate` writes into the manifest: three tasks, one flavour with a layer in float."""

    def side(per_task: list[float | None], average: float, confidence: float, error: float) -> dict[str, Any]:
        return {
            "per_task": per_task,
            "average_accuracy": average,
            "confidence": confidence,
            "calibration_error": error,
        }

    def flavour(name: str, after: list[float | None], average: float, **fields: Any) -> dict[str, Any]:
        before: list[float | None] = [81.17, 79.92, 90.38]
        drops = [None if a is None or b is None else b - a for a, b in zip(after, before, strict=True)]
        return {
            "runtimes": f"what reads {name}",
            "layers_int8": 44,
            "layers_float": [],
            "sensitivity": None,
            "images": 1234,
            "agreement": 98.25,
            "max_abs_error": 0.0712,
            "before": side(before, 83.82, 0.7512, 3.21),
            "after": side(after, average, 0.7431, 4.56),
            "drop": {"per_task": drops, "average": 83.82 - average},
            "quantisation_forgetting": 0.77,
            "gate": {"verdict": "passed", "unsure": []},
            **fields,
        }

    return {
        "method": "mse",
        "smooth": 0.5,
        "ranges": {"kept_tasks": 3, "images": 64, "tasks_with_images": [2]},
        "max_drop": 1.5,
        "flavours": {
            "int8-x86": flavour(
                "U8",
                [80.03, 80.22, 90.38],
                83.54,
                layers_float=["blocks.3.fc2"],
                sensitivity={"blocks.0.qkv": 0.0123, "blocks.3.fc2": 4.56, **{f"blocks.9.{i}": 1e-5 for i in range(9)}},
            ),
            "int8-arm": flavour("S8", [81.17, 79.92, 90.38], 83.82, quantisation_forgetting=None),
        },
        "definitions": {"quantisation_forgetting": "above 0, 8 bits hurt old tasks more", "drop": "points lost"},
        "latency": [
            {"backend": "onnxruntime", "precision": "fp32", "compute_ms": 8.25, "ratio": 1.0},
            {"backend": "openvino", "precision": "int8", "compute_ms": 3.3, "ratio": 0.4},
        ],
        "recommended": {"backend": "openvino", "precision": "int8"},
    }
