"""The latency report: right statistics, whole context; no assertion on a time."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from cdl_edge.errors import InputError
from cdl_edge.files import sha256
from cdl_edge.runtime.bundle import open_bundle
from cdl_edge.runtime.profile import flags, profile, statistics, synthetic_jpeg

KEYS = {"n", "min", "mean", "std", "cv", "p50", "p90", "p95", "p99", "max"}


def test_statistics_against_numpy():
    samples = np.random.default_rng(0).gamma(2.0, 3.0, 137)
    stage = statistics(samples)
    assert set(stage) == KEYS
    assert stage["n"] == 137
    for name, value in (
        ("min", samples.min()),
        ("mean", samples.mean()),
        ("std", samples.std()),
        ("max", samples.max()),
    ):
        assert stage[name] == pytest.approx(value)
    assert stage["cv"] == pytest.approx(samples.std() / samples.mean())
    for q in (50, 90, 95, 99):
        assert stage[f"p{q}"] == pytest.approx(np.percentile(samples, q))


def test_statistics_by_hand():
    stage = statistics(np.array([1.0, 3.0]))
    assert (stage["mean"], stage["std"], stage["cv"], stage["p50"], stage["p90"]) == (2, 1, 0.5, 2, pytest.approx(2.8))
    assert statistics(np.array([4.0]))["p99"] == 4.0


def test_flags():
    steady = np.full(200, 10.0)
    assert flags(statistics(steady)) == []
    waving = np.where(np.arange(200) % 2, 10.0, 10.6)  # cv 2.9 %, p99/p50 1.03
    assert flags(statistics(waving)) == ["unstable"]
    spikes = steady.copy()
    spikes[:5] = 30.0
    assert flags(statistics(spikes)) == ["unstable", "jitter"]


def test_report(bundle, tmp_path):
    report = profile(bundle.path, threads=1, runs=7, warmup=2, trace=tmp_path / "trace.json")
    assert {"load_ms", "first_inference_ms", "backend", "flags", "context"} <= set(report)
    stages = ("end_to_end_ms", "preprocess_ms", "compute_ms")
    trace = json.loads((tmp_path / "trace.json").read_text())
    for stage in stages:
        assert set(report[stage]) == KEYS
        assert report[stage]["n"] == len(trace[stage]) == 7
        assert report[stage] == statistics(np.array(trace[stage]))
    for end, before, compute in zip(*(trace[s] for s in stages), strict=True):
        assert end >= before + compute > 0
    context = report["context"]
    assert (context["batch"], context["runs"], context["warmup"], context["threads"]) == (1, 7, 2, 1)
    assert context["providers"] == ["CPUExecutionProvider"]
    assert "synthetic" in context["images"]
    assert context["graph_sha256"] == sha256(bundle.graph())
    assert context["files_bytes"]["prompts.bin"] == (bundle.path / "prompts.bin").stat().st_size
    assert context["peak_rss_bytes"] > 1_000_000
    assert {"cdl-edge", "onnxruntime", "python", "numpy", "pillow"} <= set(context["versions"])
    assert report["backend"] == "onnxruntime"
    assert report["flags"] == flags(report["end_to_end_ms"])
    json.dumps(report, allow_nan=False)


def test_warm_up_and_first_call_are_not_counted(bundle, tiny, monkeypatch):
    from cdl_edge.runtime.backends.onnxruntime import OrtRunner

    calls = []
    real = OrtRunner.run
    monkeypatch.setattr(OrtRunner, "run", lambda self, images: calls.append(images.copy()) or real(self, images))
    colours = [(255, 0, 0), (0, 255, 0)]
    report = profile(open_bundle(bundle.path), threads=1, runs=4, warmup=3, images=[tiny.png(c) for c in colours])
    assert len(calls) == 1 + 3 + 4
    assert [int(c[0, 0, 0].argmax()) for c in calls[-4:]] == [0, 1, 0, 1], "the images take turns"
    assert report["compute_ms"]["n"] == 4
    assert report["context"]["images"] == "2 given image(s), in turn"


def test_given_files(bundle, tiny, tmp_path):
    (tmp_path / "a.png").write_bytes(tiny.png((9, 9, 9)))
    profile(bundle, threads=1, runs=1, warmup=0, images=[tmp_path / "a.png"])
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"b\.png"):
        profile(bundle, threads=1, runs=1, images=[tmp_path / "a.png", tmp_path / "b.png"])


@pytest.mark.parametrize("arguments", [{"runs": 0}, {"warmup": -1}, {"images": []}, {"backend": "gpu9"}])
def test_wrong_arguments(bundle, arguments):
    with pytest.raises(InputError):
        profile(bundle, **arguments)


def test_the_synthetic_picture():
    image = Image.open(io.BytesIO(synthetic_jpeg()))
    assert (image.format, image.size) == ("JPEG", (640, 480))
    assert np.asarray(image).std() > 30
