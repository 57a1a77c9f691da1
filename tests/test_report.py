"""The report page: complete, self-contained, safe with hostile names, and never made from a malformed document."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdl_edge import report
from cdl_edge.errors import InputError
from cdl_edge.report import write_report
from cdl_edge.runtime.bundle import write_bundle

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


def side(rows: list[list[float]]) -> dict[str, Any]:
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
        "student": side([[91.23], [85.61, 88.44], [81.17, 79.92, 90.38]]),
        "teacher": side([[95.71], [92.33, 93.06], [90.54, 89.85, 94.49]]),
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


def save_run(folder: Path, document: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return folder


def save_bundle(folder: Path, metrics: dict[str, Any], **changes: Any) -> Path:
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


def test_full_page(tmp_path: Path, metrics: dict[str, Any], profile: dict[str, Any]) -> None:
    run, bundle = save_run(tmp_path / "run", metrics), save_bundle(tmp_path / "bundle", metrics)
    out = write_report(tmp_path / "page" / "report.html", run, bundle, profile)
    page = Page(out)
    assert page.sections == {"accuracy", "latency", "export", "card"}
    for name in ("student", "teacher"):
        for row in metrics[name]["matrix"]:
            for value in row:
                assert value is None or f">{value:.1f}</td>" in page.html
    for expected in (
        "insects & more",
        "CODA-Prompt + KDP",
        "1 h 2 min",
        "2 MB",
        "3.1 × 10⁻⁶",
        "1.0 × 10⁻⁴",
        "98.44 %",
        "within tolerance",
        "1,234",
        "a flag of tomorrow",
        "A processor",
        "250 MB",
        "mean drop in points",
        "seed (7)",
        "task 2 with 79.9 %",
        "Apache-2.0",
        *(entry["sha256"] for entry in json.loads((bundle / "manifest.json").read_text())["files"].values()),
    ):
        assert expected in page.text, expected
    assert list(out.parent.iterdir()) == [out]
    again = out.read_bytes()
    assert write_report(out, run, bundle, profile).read_bytes() == again


def test_self_contained(tmp_path: Path, metrics: dict[str, Any], profile: dict[str, Any]) -> None:
    out = write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics), profile=profile)
    page = Page(out)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"https?://|url\(|@import|@font-face", page.html)
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    targets = {a.get("id") for _, a in page.tags}
    assert all((a["href"] or "")[1:] in targets for tag, a in page.tags if tag == "a")


def test_charts_are_labelled(tmp_path: Path, metrics: dict[str, Any], profile: dict[str, Any]) -> None:
    page = Page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics), profile=profile))
    charts = [a for tag, a in page.tags if tag == "svg"]
    assert len(charts) == 3
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert "Student, after task 3: 83.82 %" in page.text
    assert page.html.count('class="mark"') == 3
    assert "1 of 500 calls took longer" in page.text


def test_names_are_escaped(tmp_path: Path, metrics: dict[str, Any]) -> None:
    metrics["config"]["data"] = f"folder:/x/{HOSTILE}"
    bundle = save_bundle(tmp_path / "bundle", metrics, name=HOSTILE)
    page = Page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics), bundle))
    assert "<script" not in page.html
    assert page.html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4  # title, heading, class, skipped image
    assert not any("onload" in attrs for _, attrs in page.tags)


def test_lone_surrogates_of_file_names_are_replaced(tmp_path: Path, metrics: dict[str, Any]) -> None:
    metrics["classes"][0] = "b\udcffe"
    assert "b?e" in Page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics))).text


def test_sections_without_data_are_absent(tmp_path: Path, metrics: dict[str, Any], profile: dict[str, Any]) -> None:
    metrics["teacher"] = None
    metrics["config"]["distill"] = "none"
    metrics["backbones"].pop("teacher")
    for key in ("skipped", "definitions", "versions"):
        metrics.pop(key)
    page = Page(write_report(tmp_path / "run.html", save_run(tmp_path / "run", metrics)))
    assert page.sections == {"accuracy", "card"}
    for absent in (
        "(teacher)",
        "Versions",
        "What the metrics mean",
        "unreadable",
        "Latency",
        "Parity",
        "builtin:teacher",
    ):
        assert absent not in page.text, absent

    bundle = save_bundle(tmp_path / "bundle", metrics, training=None, parity=None, accuracy=None, versions=None)
    del profile["trace_ms"], profile["context"]
    profile["flags"] = []
    page = Page(write_report(tmp_path / "bundle.html", bundle=bundle, profile=profile))
    assert page.sections == {"latency", "export", "card"}
    for absent in ("Parity", "Distribution", "Accuracy recorded", "Training settings", "Forgetting"):
        assert absent not in page.text, absent
    assert "No flag" in page.text
    assert "records no accuracy" in page.text


def test_bundle_alone_shows_the_training_it_keeps(tmp_path: Path, metrics: dict[str, Any]) -> None:
    page = Page(write_report(tmp_path / "r.html", bundle=save_bundle(tmp_path / "bundle", metrics)))
    assert page.sections == {"accuracy", "export", "card"}
    assert "81.2" in page.text


def test_one_task(tmp_path: Path, metrics: dict[str, Any]) -> None:
    metrics |= {"tasks": [[0, 1, 2, 3, 4, 5]], "student": side([[100.0]]), "teacher": side([[0.0]])}
    page = Page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics)))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert ">100</td>" in page.html


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 2),
        ("config", None),
        ("classes", []),
        ("classes", [1, 2, 3, 4, 5, 6]),
        ("tasks", [[0, 1], [2, 3]]),
        ("tasks", [[0, 1], [2, 3], [4, 9]]),
        ("student", None),
        ("student.average_accuracy", "high"),
        ("student.average_accuracy", True),
        ("student.forgetting", float("nan")),
        ("student.matrix", [[90.0]]),
        ("student.matrix", [[90.0, 1.0, None], [90.0, 90.0, None], [90.0, 90.0, 90.0]]),
        ("student.matrix", [[None, None, None], [90.0, 90.0, None], [90.0, 90.0, 90.0]]),
        ("teacher.matrix", [[101.0, None, None], [90.0, 90.0, None], [90.0, 90.0, 90.0]]),
        ("student.accuracy_after_task", [90.0]),
        ("student.forgetting_after_task", [0.0, 1e300, 2.0]),
        ("seconds", 10**400),
        ("seconds", "long"),
        ("skipped", "none"),
        ("versions", ["torch"]),
        ("backbones", {"student": "vit"}),
        ("images", {"train": "many"}),
    ],
)
def test_malformed_metrics(tmp_path: Path, metrics: dict[str, Any], path: str, value: object) -> None:
    *parents, key = path.split(".")
    target = metrics
    for parent in parents:
        target = target[parent]
    target[key] = value
    with pytest.raises(InputError, match=r"metrics\.json"):
        write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"run"', "[" * 100_000])
def test_damaged_metrics(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"metrics\.json"):
        write_report(tmp_path / "r.html", save_run(tmp_path / "run", text))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("end_to_end_ms", None),
        ("end_to_end_ms", {"p50": 1.0}),
        ("compute_ms", {"p50": "quick"}),
        ("flags", "unstable"),
        ("flags", [1]),
        ("context", [1]),
        ("trace_ms", []),
        ("trace_ms", [1.0, None]),
        ("trace_ms", [-1.0]),
        ("trace_ms", {"end_to_end_ms": [1.0]}),
    ],
)
def test_malformed_profile(
    tmp_path: Path, metrics: dict[str, Any], profile: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(InputError, match="profile"):
        write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics), profile={**profile, key: value})


def test_what_is_missing_or_does_not_fit(tmp_path: Path, metrics: dict[str, Any], profile: dict[str, Any]) -> None:
    run, bundle = save_run(tmp_path / "run", metrics), save_bundle(tmp_path / "bundle", metrics)
    out = tmp_path / "r.html"
    with pytest.raises(InputError, match="nothing to report on"):
        write_report(out, profile=profile)
    with pytest.raises(InputError, match="no such folder"):
        write_report(out, tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such bundle"):
        write_report(out, bundle=tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a folder"):
        write_report(tmp_path, run)
    with pytest.raises(InputError, match="another graph"):
        write_report(out, run, bundle, {**profile, "context": {"graph_sha256": "0" * 64}})
    with pytest.raises(InputError, match=r"accuracy\.per_task"):
        write_report(out, bundle=save_bundle(tmp_path / "odd", metrics, accuracy={"per_task": ["good"]}))
    metrics["student"]["matrix"][2][0] = 12.0
    with pytest.raises(InputError, match="not exported from this run"):
        write_report(out, save_run(tmp_path / "other", metrics), bundle)
    (bundle / "backbone.bin").write_bytes(b"y" * 2_000_000)
    with pytest.raises(InputError, match="changed since it was written"):
        write_report(out, bundle=bundle)
    assert not out.exists()


def test_failed_write_leaves_the_old_page(
    tmp_path: Path, metrics: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page" / "r.html"
    write_report(out, save_run(tmp_path / "run", metrics))
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(out, tmp_path / "run")
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "trace",
    [
        [5.0],
        [5.0] * 100,
        [0.0, 0.0],
        [0.0, 1e-5],
        [1.0, 1.0 + 1e-12],
        [1.0, 2.0, 1e6],
        np.random.default_rng(1).lognormal(3, 1, 1000).tolist(),
        (100 + np.random.default_rng(2).normal(0, 0.01, 1000)).tolist(),
    ],
)
def test_histogram_counts_everything(trace: list[float]) -> None:
    edges, counts, overflow = report.histogram(trace)
    assert sum(counts) + overflow == len(trace)
    assert len(edges) == len(counts) + 1 <= 60
    assert edges[0] <= min(trace)
    assert overflow <= 0.01 * len(trace) + 1
    np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0], rtol=1e-3)


@pytest.mark.parametrize(("low", "high"), [(0, 8), (79.3, 95.2), (-3, 12), (0.001, 0.0012), (0, 1e6)])
def test_ticks_cover_the_range(low: float, high: float) -> None:
    marks = report.ticks(low, high)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 3 <= len(marks) <= 7


def test_labels_are_spread() -> None:
    moved = report.spread([100.0, 101.0, 20.0], 30)
    assert moved[2] == 20.0
    assert moved[1] - moved[0] >= 30


@pytest.mark.parametrize("palette", [report.HEAT_LIGHT, report.HEAT_DARK])
def test_heat_map_numbers_are_readable(palette: tuple[str, ...]) -> None:
    assert all(report.contrast(report.ink(colour), colour) >= 4.5 for colour in palette)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([81.0, 93.0], (80, 100)), ([100.0], (90, 100)), ([0.0], (0, 10)), ([42.0, 44.0], (40, 50))],
)
def test_heat_domain(values: list[float], expected: tuple[float, float]) -> None:
    assert report.heat_domain(values) == expected


def test_numbers_in_words() -> None:
    assert [report.size_text(n) for n in (0, 999, 312_345, 9_550_000, 2.5e9)] == [
        "0 bytes",
        "999 bytes",
        "312 kB",
        "9.55 MB",
        "2.5 GB",
    ]
    assert [report.duration_text(s) for s in (3.14159, 65, 3725)] == ["3.14 s", "1 min 5 s", "1 h 2 min"]
    assert [report.ms_text(v) for v in (0.0042, 0.5, 4.5, 1234.5)] == ["0.0042", "0.500", "4.50", "1,234"]
