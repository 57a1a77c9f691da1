"""A section is there when there is something to show in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdl_edge.report.model_page import write_report


@pytest.mark.slow
def test_sections_without_data_are_absent(
    tmp_path: Path,
    metrics: dict[str, Any],
    profile: dict[str, Any],
    save_run: Callable[..., Path],
    save_bundle: Callable[..., Path],
    read_page: Callable[[Path], Any],
) -> None:
    metrics["teacher"] = None
    metrics["config"]["distill"] = "none"
    metrics["backbones"].pop("teacher")
    for key in ("skipped", "definitions", "versions"):
        metrics.pop(key)
    page = read_page(write_report(tmp_path / "run.html", save_run(tmp_path / "run", metrics)))
    assert page.sections == {"pictures", "accuracy", "card"}
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
    page = read_page(write_report(tmp_path / "bundle.html", bundle=bundle, profile=profile))
    assert page.sections == {"latency", "export", "card"}
    for absent in ("Parity", "Distribution", "Accuracy recorded", "Training settings", "Forgetting"):
        assert absent not in page.text, absent
    assert "No flag" in page.text
    assert "records no accuracy" in page.text


def test_bundle_alone_shows_the_training_it_keeps(
    tmp_path: Path, metrics: dict[str, Any], save_bundle: Callable[..., Path], read_page: Callable[[Path], Any]
) -> None:
    page = read_page(write_report(tmp_path / "r.html", bundle=save_bundle(tmp_path / "bundle", metrics)))
    assert page.sections == {"accuracy", "export", "card"}
    assert "81.2" in page.text


def test_classes_that_a_device_has_learnt_are_counted(
    tmp_path: Path, metrics: dict[str, Any], save_bundle: Callable[..., Path], read_page: Callable[[Path], Any]
) -> None:
    """The page showed those of the training, as if the bundle could answer no other."""
    names = [*metrics["classes"], "hornet"]
    more = {"classes": names, "tasks": [*metrics["tasks"], [6]], "outputs": {"logits": [1, 7]}}
    more |= {"enrolments": [{"name": "hornet", "images": 5, "at": "2026-11-28T00:00:00Z"}], "enrolled_on": "0" * 16}
    bundle = save_bundle(tmp_path / "bundle", metrics, **more)
    text = read_page(write_report(tmp_path / "r.html", bundle=bundle)).text
    assert "Classes 7 learnt in 4 tasks" in text and "one of the 7 classes" in text
    assert "Enrolled on the device: hornet. Every accuracy here was measured before that" in text


def test_options_of_a_distiller_without_a_teacher_are_shown(
    tmp_path: Path, metrics: dict[str, Any], save_run: Callable[..., Path], read_page: Callable[[Path], Any]
) -> None:
    metrics["teacher"] = None
    metrics["config"] |= {"distill": "two-heads", "alpha": 0.3125}
    text = read_page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics))).text
    assert "0.3125" in text and "builtin:teacher" not in text.partition("Backbones")[0]


def test_one_task(
    tmp_path: Path,
    metrics: dict[str, Any],
    save_run: Callable[..., Path],
    side: Callable[..., dict[str, Any]],
    read_page: Callable[[Path], Any],
) -> None:
    metrics |= {"tasks": [[0, 1, 2, 3, 4, 5]], "student": side([[100.0]]), "teacher": side([[0.0]])}
    page = read_page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics)))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert ">100</td>" in page.html
