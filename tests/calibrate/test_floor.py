"""What is recommended: the fastest that answers as fp32 does, and no other precision for nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cdl_edge.calibrate.floor import recommend, shortfall, spread_error
from cdl_edge.calibrate.latency import TimedCandidate

EXPECTED = np.eye(4, dtype=np.float32)
TASKS = ((0, 1), (2, 3))


def candidates(*entries: tuple[str, str, float], answers: np.ndarray = EXPECTED) -> list[TimedCandidate]:
    """(backend, precision, time as a share of the first one's), all with the same answers."""
    return [TimedCandidate(backend, precision, ratio, ratio, answers) for backend, precision, ratio in entries]


def test_eight_bits_that_save_nothing_are_not_recommended():
    """0.83 ms beside 0.85 ms was called the fastest, although every turn had it the slower one."""
    timed = candidates(("onnxruntime", "fp32", 1.0), ("onnxruntime", "int8", 0.98), ("openvino", "fp32", 1.3))
    advice, refused = recommend(timed, EXPECTED, None, TASKS)
    assert advice == {"backend": "onnxruntime", "precision": "fp32"}
    assert [r["reason"] for r in refused] == ["it saves 2.0 % of fp32's time, at least 5 % are asked"]


def test_they_are_compared_with_the_fastest_fp32():
    timed = candidates(("onnxruntime", "fp32", 1.0), ("openvino", "fp32", 0.7), ("openvino", "int8", 0.68))
    assert recommend(timed, EXPECTED, None, TASKS)[0] == {"backend": "openvino", "precision": "fp32"}
    timed = candidates(("onnxruntime", "fp32", 1.0), ("openvino", "fp32", 0.7), ("openvino", "int8", 0.5))
    assert recommend(timed, EXPECTED, None, TASKS) == ({"backend": "openvino", "precision": "int8"}, [])


def test_what_the_self_test_of_a_device_refuses_is_not_recommended():
    """No pack with it could be installed."""
    fast = replace(candidates(("onnxruntime", "int8", 0.5))[0], failed="the self-test fails (relative_error 0.21)")
    advice, refused = recommend([*candidates(("onnxruntime", "fp32", 1.0)), fast], EXPECTED, None, TASKS)
    assert advice["precision"] == "fp32"
    assert refused == [{"backend": "onnxruntime", "precision": "int8", "reason": fast.failed}]


def test_the_turns_decide_and_not_the_medians():
    slower = TimedCandidate("onnxruntime", "int8", 0.5, 1.1, EXPECTED)
    advice, refused = recommend([*candidates(("onnxruntime", "fp32", 1.0)), slower], EXPECTED, None, TASKS)
    assert advice["precision"] == "fp32" and refused == []


def test_few_answers_say_little_so_that_the_logits_have_to_be_close():
    """An 8-bit graph that lost 4 points of 48 images agreed on the 4 of the self-test; its logits were off by 45 %."""
    rng = np.random.default_rng(0)
    expected = 10 * np.eye(4, 20, dtype=np.float32)
    noise = rng.standard_normal(expected.shape).astype(np.float32)
    off = expected + 0.45 * noise * expected.std(axis=1, keepdims=True) / noise.std()
    assert (off.argmax(1) == expected.argmax(1)).all() and spread_error(expected, off) == pytest.approx(0.45, abs=0.02)
    tasks = (tuple(range(20)),)
    reason = shortfall(expected, off, None, tasks)
    assert reason is not None and "4 images are compared" in reason and "of their spread" in reason
    close = expected + (off - expected) / 3
    assert shortfall(expected, close, None, tasks) is None
    assert shortfall(expected, close + 100, None, tasks) is None  # what all logits share changes no answer
    many = (np.tile(expected, (25, 1)), np.tile(off, (25, 1)))
    assert shortfall(*many, None, tasks) is None  # a hundred answers speak for themselves
