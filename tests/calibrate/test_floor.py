"""What is recommended: the fastest that answers as fp32 does, and no other precision for nothing."""

from __future__ import annotations

import numpy as np

from cdl_edge.calibrate.floor import recommend
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


def test_the_turns_decide_and_not_the_medians():
    slower = TimedCandidate("onnxruntime", "int8", 0.5, 1.1, EXPECTED)
    advice, refused = recommend([*candidates(("onnxruntime", "fp32", 1.0)), slower], EXPECTED, None, TASKS)
    assert advice["precision"] == "fp32" and refused == []
