"""What each precision that runs here takes, and whether a device would have it."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.calibrate import latency
from cdl_edge.calibrate.calibrate_bundle import calibrate
from cdl_edge.calibrate.latency import time_candidates
from cdl_edge.runtime import open_bundle, selftest


@pytest.mark.slow
def test_every_candidate_answers_the_self_test(exported, tmp_path, monkeypatch):
    """8 bits were recommended that no device could install: its self-test has a limit of its own."""
    monkeypatch.setattr(latency, "CANDIDATES", (("onnxruntime", "fp32"), ("onnxruntime", "int8")))
    calibrate(exported(), tmp_path / "eight", schemes=["int8-x86"], smooth=None, searching=False)
    bundle = open_bundle(tmp_path / "eight")
    monkeypatch.setitem(selftest.LIMITS, "int8", 10.0)  # the 8 bits of so small a student are poor
    images = bundle.selftest()[0][:2]
    good = time_candidates(bundle, images)
    assert [(one.precision, one.failed) for one in good] == [("fp32", None), ("int8", None)]
    assert all(np.isfinite(one.answers).all() and one.compute_ms > 0 for one in good)
    monkeypatch.setitem(selftest.LIMITS, "int8", 1e-9)
    exact, eight = time_candidates(bundle, images)
    assert exact.failed is None
    assert eight.failed is not None and eight.failed.startswith("the self-test fails: its logits are not the student's")
    assert "relative_error" in eight.failed and str(tmp_path) not in eight.failed
    assert set(eight.to_json()) == {"backend", "precision", "compute_ms", "ratio"}
