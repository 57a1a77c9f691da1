"""A difference is called one only when it is beyond the noise."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.measurement.compare import block_length, bootstrap_medians, compare, wander, warnings
from cdl_edge.measurement.profile import profile


def report(trace: np.ndarray, **context) -> dict:
    return {"backend": "onnxruntime", "context": {"threads": 1, **context}, "flags": [], "trace_ms": trace.tolist()}


def waves(n: int, memory: float, seed: int, middle: float = 10.0, spread: float = 0.1) -> np.ndarray:
    """Times whose deviations last: an AR(1) process; memory 0 is white noise."""
    rng = np.random.default_rng(seed)
    noise, out = rng.normal(size=n), np.empty(n)
    out[0] = noise[0]
    for i in range(1, n):
        out[i] = memory * out[i - 1] + (1 - memory**2) ** 0.5 * noise[i]
    return middle * np.exp(spread * out)


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "faster"), (1.0, "no difference"), (1.1, "slower")])
def test_verdicts(factor, verdict):
    a, b = (waves(600, 0.3, seed) for seed in (0, 1))
    found = compare(report(a), report(b * factor))
    assert found["verdict"] == verdict
    assert found["ratio"] == pytest.approx(np.median(b) * factor / np.median(a))
    low, high = found["interval"]
    assert low < found["ratio"] < high
    assert found["a"]["n"] == 600 and found["a"]["p50_ms"] == pytest.approx(np.median(a))
    assert found["warnings"] == []
    assert compare(report(b * factor), report(a))["verdict"] == {"faster": "slower", "slower": "faster"}.get(
        verdict, verdict
    )
    json.dumps(found, allow_nan=False)


def test_the_same_numbers_twice():
    a = waves(200, 0.5, 0)
    found = compare(report(a), report(a), floor=0.0)
    assert (found["verdict"], found["ratio"]) == ("no difference", 1.0)
    constant = np.full(50, 3.0)
    assert compare(report(constant), report(constant))["interval"] == [1.0, 1.0]
    assert compare(report(constant), report(constant * 1.1))["verdict"] == "slower"


@pytest.mark.slow
def test_a_difference_below_the_floor_is_none():
    a = waves(5000, 0, 0, spread=0.01)
    assert compare(report(a), report(a * 1.015))["verdict"] == "no difference"
    assert compare(report(a), report(a * 1.015), floor=0.01)["verdict"] == "slower"


def test_a_machine_that_wanders_within_a_run_may_have_wandered_between_two():
    calm, rng = waves(800, 0, 0, spread=0.02), np.random.default_rng(0)
    disturbed = calm * np.repeat(1 + 0.15 * rng.random(8), 100)
    assert wander(calm) < 0.005 < 0.03 < wander(disturbed) == pytest.approx(0.04, abs=0.02)
    moved = compare(report(calm), report(disturbed))
    assert (moved["verdict"], moved["floor"]) == ("no difference", moved["b"]["wander"])
    assert compare(report(calm), report(disturbed), floor=0.02)["verdict"] == "slower"
    assert compare(report(calm), report(disturbed * 1.3))["verdict"] == "slower", "beyond what wandered"
    assert compare(report(calm), report(calm * 1.03))["floor"] == 0.02


@pytest.mark.slow
def test_calls_that_resemble_their_neighbours_need_blocks():
    # 24 pairs of runs with nothing between them: single draws call far more than one in twenty different.
    wrong = {"blocks": 0, "single": 0}
    for seed in range(24):
        a, b = (waves(400, 0.95, 2 * seed + i, spread=0.2) for i in (0, 1))
        wrong["blocks"] += compare(report(a), report(b), floor=0.0)["verdict"] != "no difference"
        rng = np.random.default_rng(0)
        low, high = np.quantile(bootstrap_medians(b, 1, rng) / bootstrap_medians(a, 1, rng), [0.025, 0.975])
        wrong["single"] += not low <= 1 <= high
    assert wrong["blocks"] <= 6 < 12 <= wrong["single"]


def test_block_length_follows_the_memory():
    lengths = [block_length(waves(1000, memory, 0)) for memory in (0.0, 0.8, 0.97)]
    assert lengths[0] == 10 and lengths[0] < lengths[1] < lengths[2] <= 125  # n^(1/3) and n / 8
    assert block_length(np.ones(8)) == 1
    # One slow call in the middle of waves hides nothing.
    spiky = waves(1000, 0.8, 0)
    spiky[500] = 1e4
    assert abs(block_length(spiky) - lengths[1]) <= 4


def test_the_bootstrap_knows_the_spread_of_a_median():
    trace = np.random.default_rng(0).normal(10, 1, 2000)
    drawn = bootstrap_medians(trace, 1, np.random.default_rng(1))
    assert drawn.std() == pytest.approx((np.pi / 2 / 2000) ** 0.5, rel=0.15)  # of white noise: sqrt(pi / 2 / n)


def test_warnings_name_what_differs():
    a = {"backend": "onnxruntime", "flags": ["jitter"], "context": {"batch": 1, "threads": 1, "cpu": "x"}}
    b = {"backend": "openvino", "flags": [], "context": {"batch": 4, "threads": 1, "cpu": "x"}}
    found = warnings(a, b)
    assert [w for w in found if "backend: onnxruntime and openvino" in w] and [
        w for w in found if "batch: 1 and 4" in w
    ]
    busy = warnings({**a, "context": {**a["context"], "load_average": 3.0, "cpu_count": 2}}, a)
    assert [w for w in busy if "busy" in w] == ["A was measured on a busy machine: load 3.0 on 2 core(s)"]
    assert "A is flagged jitter" in found and not [w for w in found if "thread" in w or "cpu" in w]
    assert "B does not say under which conditions it was measured" in warnings(a, {"trace_ms": []})
    assert compare({**a, "trace_ms": [1.0] * 50}, {**b, "trace_ms": [1.0] * 50})["warnings"] == found


def test_files(bundle, tmp_path):
    result = profile(bundle.path, threads=1, runs=40, warmup=2, trace=tmp_path / "trace.json")
    (tmp_path / "a.json").write_text("a line before\n" + json.dumps(result))
    found = compare(tmp_path / "a.json", tmp_path / "trace.json")
    assert found["verdict"] == "no difference" and found["ratio"] == pytest.approx(1, abs=1e-3)
    assert [w for w in found["warnings"] if "flagged" not in w and "busy" not in w] == []
    assert compare(tmp_path / "trace.json", tmp_path / "trace.json", "compute_ms")["stage"] == "compute_ms"
    with pytest.raises(InputError, match="--trace"):
        compare(tmp_path / "a.json", tmp_path / "trace.json", "compute_ms")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "{}", '{"trace_ms": 3}', '{"trace_ms": [1, 2]}', '{"trace_ms": ["x"]}']
    + [json.dumps({"trace_ms": [bad] * 50}) for bad in (0, -1, float("nan"), [1])],
)
def test_what_is_no_report(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=r"bad\.json"):
        compare(tmp_path / "bad.json", report(np.ones(50)))


def test_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.json"):
        compare(tmp_path / "nothing.json", report(np.ones(50)))
    with pytest.raises(InputError, match="floor"):
        compare(report(np.ones(50)), report(np.ones(50)), floor=1.5)
