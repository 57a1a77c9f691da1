"""What the pages say is so: about confidence, about chance, about what was not measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdl_edge.artefacts.bundle import open_bundle
from cdl_edge.errors import InputError
from cdl_edge.report.model_page import write_report
from cdl_edge.report.words import value_text

CONFIDENCE = {"images": 91, "temperature": 1.4, "unknown": {"below": 0.5, "share": 0.05}, "task": {"scale": 1.0}}


@pytest.mark.slow
def test_a_calibrated_bundle_is_not_called_uncalibrated(tmp_path, metrics, save_bundle, read_page):
    old = save_bundle(tmp_path / "old", metrics)
    text = read_page(write_report(tmp_path / "old.html", bundle=old)).text
    assert "is not calibrated: choose a threshold" in text
    new = save_bundle(tmp_path / "new", metrics, confidence=CONFIDENCE)
    text = read_page(write_report(tmp_path / "new.html", bundle=new)).text
    assert "choose a threshold" not in text
    assert (
        "a confidence is calibrated on 91 held-out images" in text
        and "`" not in text
        and "5 % of the known ones" in text
    )


@pytest.mark.parametrize(("images", "points"), [(91, "7.6"), (5000, "1.0")])
def test_chance_is_as_large_as_the_images_are_few(tmp_path, metrics, save_run, read_page, images, points):
    metrics["images"] = {"train": 360, "val": images}  # average accuracy 83.8 %
    text = read_page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", metrics))).text
    assert "about a point are noise" not in text
    assert f"measured on {images:,} images: chance alone moves it by {points} points" in text


def test_a_profile_of_another_bundle_with_the_same_graph_is_refused(
    tmp_path: Path, metrics: dict[str, Any], profile: dict[str, Any], save_bundle: Callable[..., Path]
) -> None:
    """Bundles of one architecture share their graph to the byte."""
    one, other = save_bundle(tmp_path / "a", metrics), save_bundle(tmp_path / "b", metrics, learner="apt")
    mine, theirs = (open_bundle(b).manifest.document for b in (one, other))
    graph = mine["graphs"]["student"]
    assert mine["files"][graph] == theirs["files"][graph]
    context = {"graph_sha256": mine["files"][graph]["sha256"], "manifest_sha256": mine["manifest_sha256"]}
    write_report(tmp_path / "r.html", bundle=one, profile={**profile, "context": context})
    with pytest.raises(InputError, match="measured on another bundle"):
        write_report(tmp_path / "s.html", bundle=other, profile={**profile, "context": context})


def test_a_profile_beside_a_run_alone_is_refused(tmp_path, metrics, profile, save_run, save_bundle, read_page):
    """A run does not say which bundles were made from it: any latency could stand under its name."""
    run, bundle = save_run(tmp_path / "run", metrics), save_bundle(tmp_path / "b", metrics)
    context = {"manifest_sha256": open_bundle(bundle).manifest.manifest_sha256, "precision": "int8"}
    with pytest.raises(InputError, match="without the bundle"):
        write_report(tmp_path / "r.html", run, profile={**profile, "context": context})
    assert not (tmp_path / "r.html").exists()
    text = read_page(write_report(tmp_path / "r.html", run, bundle, {**profile, "context": context})).text
    assert "onnxruntime in int8" in text  # beside an accuracy that is of fp32


def test_energy_that_was_not_measured():
    said = value_text("energy", {"source": None, "reason": "the board tells nothing about its power"})
    assert said == "not measured: the board tells nothing about its power"
