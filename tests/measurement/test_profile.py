"""The latency report: right statistics, whole context; no assertion on a time."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

import cdl_edge.measurement.profile as module
from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.errors import InputError
from cdl_edge.files import sha256
from cdl_edge.measurement.energy import Board
from cdl_edge.measurement.profile import STAGES, flags, profile, statistics, synthetic_jpeg
from cdl_edge.runtime import load
from cdl_edge.runtime.backends.onnxruntime import OrtEngine
from cdl_edge.runtime.runner import Runner

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
    stages = ("end_to_end_ms", "preprocess_ms", "compute_ms", "post_ms")
    trace = json.loads((tmp_path / "trace.json").read_text())
    for stage in stages:
        assert set(report[stage]) == KEYS
        assert report[stage]["n"] == len(trace[stage]) == 7
        assert report[stage] == statistics(np.array(trace[stage]))
    for end, before, compute, post in zip(*(trace[s] for s in stages), strict=True):
        assert end == pytest.approx(before + compute + post) and min(before, compute, post) > 0
    assert trace["context"] == report["context"]
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
    calls = []
    real = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, images: calls.append(images.copy()) or real(self, images))
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


def test_a_board_with_everything(bundle, tmp_path):
    files = {
        "sys/class/hwmon/hwmon0/name": "ina3221",
        "sys/class/hwmon/hwmon0/in1_label": "VDD_IN",
        "sys/class/hwmon/hwmon0/in1_input": "5000",
        "sys/class/hwmon/hwmon0/curr1_input": "2000",
        "sys/class/thermal/cooling_device0/type": "gpu-throttle-alert",
        "sys/class/thermal/cooling_device0/cur_state": "1",
        "var/lib/nvpmodel/status": "pmode:0007",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    report = profile(bundle, threads=1, runs=30, sensors=Board(tmp_path))
    assert report["energy"]["mean_w"] == pytest.approx(10)
    assert report["energy"]["energy_per_image_j"] == pytest.approx(10 * report["energy"]["seconds"] / 30)
    assert report["context"]["power_mode"] == "7"
    assert report["context"]["throttled_by"] == ["gpu-throttle-alert"] and "throttled" in report["flags"]
    bare = profile(bundle, threads=1, runs=5, sensors=Board(tmp_path / "nothing"))
    assert bare["energy"]["source"] is None and bare["energy"]["reason"]
    assert bare["context"]["throttled_by"] == [] and "throttled" not in bare["flags"]
    json.dumps([report, bare], allow_nan=False)


def test_stages_of_a_backend_that_knows_them(bundle, tmp_path, monkeypatch):
    def timed(self, feeds):
        return self.call(feeds), {"h2d_ms": 0.1, "enqueue_ms": 0.9, "gpu_ms": 1.0, "d2h_ms": 0.2}

    monkeypatch.setattr(OrtEngine, "timed", timed, raising=False)
    report = profile(bundle, threads=1, runs=5, trace=tmp_path / "trace.json")
    assert [key for key in report if key in STAGES] == list(STAGES), "in the order in which they happen"
    assert report["gpu_ms"]["p50"] == 1.0 and report["h2d_ms"]["n"] == 5
    assert "enqueue-bound" in report["flags"]
    assert set(STAGES) < set(json.loads((tmp_path / "trace.json").read_text()))
    stage = statistics(np.ones(3))
    assert flags(stage, {"gpu_ms": stage, "enqueue_ms": statistics(np.full(3, 0.79))}) == []


def test_how_many_calls(bundle, monkeypatch):
    monkeypatch.setattr(module, "CALLS", 12)
    assert profile(bundle, threads=1)["context"]["runs"] == 12
    monkeypatch.setattr(module, "LEAST", 5)
    monkeypatch.setattr(module, "SECONDS", 0.0)  # a slow board
    assert profile(bundle, threads=1)["context"]["runs"] == 5
    assert profile(bundle, threads=1, runs=9)["context"]["runs"] == 9, "who asks for a number gets it"


def test_agreement_with_fp32(bundle, tiny, tmp_path):
    assert profile(bundle, threads=1, runs=1)["context"]["agreement"] is None
    images = np.stack([tiny.plain(c) for c in ((255, 0, 0), (0, 255, 0))])
    with load(bundle, threads=1) as runner:
        logits = runner.infer(images)
    logits[1] = logits[1, ::-1]
    np.savez(tmp_path / "selftest.npz", images=images, logits=logits)
    files = {name: bundle.path / name for name in bundle.manifest.document["files"]} | {
        "s.npz": tmp_path / "selftest.npz"
    }
    tested = write_bundle(tmp_path / "tested", {**bundle.manifest.document, "selftest": "s.npz"}, files)
    agreement = profile(tested, threads=1, runs=1)["context"]["agreement"]
    assert (agreement["images"], agreement["top1"]) == (2, 50.0) and agreement["max_abs_error"] > 1


def test_only_a_trace_of_ours_is_replaced(bundle, tmp_path):
    trace = tmp_path / "trace.json"
    for content in ('{"name": "a web page"}', "not JSON"):
        trace.write_text(content)
        with pytest.raises(InputError, match="is there already, and is not just a trace of ours"):
            profile(bundle.path, threads=1, runs=2, warmup=0, trace=trace)
        assert trace.read_text() == content
    trace.unlink()
    for _ in range(2):
        profile(bundle.path, threads=1, runs=2, warmup=0, trace=trace)
    assert len(json.loads(trace.read_text())["end_to_end_ms"]) == 2
