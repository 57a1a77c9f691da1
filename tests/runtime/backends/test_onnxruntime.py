"""What only the ONNX Runtime backend has: names, options, no silent fallback. The rest is in test_contract.py."""

from __future__ import annotations

import sys

import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.backends.onnxruntime import OrtRunner
from cdl_edge.runtime.machine import usable_cores


def test_description(bundle):
    import onnxruntime

    with load(bundle, threads=1) as runner:
        assert runner.describe() == {
            "backend": "onnxruntime",
            "providers": ["CPUExecutionProvider"],
            "threads": 1,
            "version": onnxruntime.__version__,
            "precision": "fp32",
        }
        assert runner.load_ms > 0
    with load(bundle) as runner:
        assert runner.describe()["threads"] == usable_cores()


def test_session_options(bundle, monkeypatch):
    import onnxruntime

    seen = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda p, o, **k: seen.append(o) or real(p, o, **k))
    load(bundle, threads=1).close()
    load(bundle, threads=2).close()
    one, two = seen
    assert (one.intra_op_num_threads, two.intra_op_num_threads) == (1, 2)
    assert one.inter_op_num_threads == two.inter_op_num_threads == 1
    assert one.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert one.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("name", ["auto", "onnxruntime", "ort", "cpu"])
def test_backend_names(bundle, name):
    with load(bundle.path, name, threads=1) as runner:
        assert runner.describe()["backend"] == "onnxruntime"


def test_an_unknown_backend(bundle):
    with pytest.raises(InputError, match="did you mean 'onnxruntime'"):
        load(bundle, "onnxruntme")


def test_cuda_that_is_not_built_in(bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="CUDAExecutionProvider cannot be used here"):
        load(bundle, "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_falls_back_silently(bundle, monkeypatch):
    """onnxruntime-gpu lists CUDA even when it cannot load it, and goes on with the CPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(InputError, match="fell back to CPUExecutionProvider"):
        OrtRunner(bundle, provider="cuda")


def test_onnxruntime_is_missing(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        load(bundle)
