"""No page is made from a malformed document, nor from documents that do not belong together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdl_edge.errors import InputError
from cdl_edge.report.model_page import write_report


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
def test_malformed_metrics(
    tmp_path: Path, metrics: dict[str, Any], path: str, value: object, save_run: Callable[..., Path]
) -> None:
    *parents, key = path.split(".")
    target = metrics
    for parent in parents:
        target = target[parent]
    target[key] = value
    with pytest.raises(InputError, match=r"metrics\.json"):
        write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"run"', "[" * 100_000])
def test_damaged_metrics(tmp_path: Path, text: str, save_run: Callable[..., Path]) -> None:
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
    tmp_path: Path,
    metrics: dict[str, Any],
    profile: dict[str, Any],
    key: str,
    value: object,
    save_run: Callable[..., Path],
) -> None:
    with pytest.raises(InputError, match="profile"):
        write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics), profile={**profile, key: value})


def test_what_is_missing_or_does_not_fit(
    tmp_path: Path,
    metrics: dict[str, Any],
    profile: dict[str, Any],
    save_run: Callable[..., Path],
    save_bundle: Callable[..., Path],
) -> None:
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
