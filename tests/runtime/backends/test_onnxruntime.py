"""What only the ONNX Runtime backend has: names, options, no silent fallback. The rest is in test_contract.py."""

from __future__ import annotations

import os
import sys

import pytest

from cdl_edge.cores import default_threads
from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.backends.onnxruntime import _kept
from cdl_edge.runtime.runner import INT8
from cdl_edge.runtime.secret import private_folder


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
        assert runner.describe()["threads"] == default_threads()


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
    assert two.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("name", ["auto", "onnxruntime", "ort", "cpu"])
def test_backend_names(bundle, name):
    with load(bundle.path, name, threads=1) as runner:
        assert runner.describe()["backend"] == "onnxruntime"


def test_an_unknown_backend(bundle):
    with pytest.raises(InputError, match="did you mean 'onnxruntime'"):
        load(bundle, "onnxruntme")


GPU = {"cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}


@pytest.mark.parametrize("backend", GPU)
def test_a_provider_that_is_not_built_in(bundle, monkeypatch, backend):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match=f"{GPU[backend]} cannot be used here"):
        load(bundle, backend)


class Session:
    """Stands in for a session on a GPU: remembers what it was asked for."""

    def __init__(self, path, options, providers):
        import onnxruntime

        self.asked = providers
        self.real = onnxruntime.original(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self):
        return [p if isinstance(p, str) else p[0] for p in self.asked]

    def __getattr__(self, name):
        return getattr(self.real, name)


def test_what_tensorrt_inside_of_onnxruntime_is_asked_for(bundle, make_bundle, tiny, monkeypatch):
    """Its engines are found again by structure: another version of the bundle must look elsewhere."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "original", onnxruntime.InferenceSession, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*GPU.values(), "CPUExecutionProvider"])
    folders = []
    for opened in (bundle, make_bundle("other", graph={"bias": tiny.BIAS + 1})):
        with load(opened, "ort-tensorrt", threads=1) as runner:
            (name, options), *behind = runner.engine._session.asked
            assert (name, behind) == (GPU["ort-tensorrt"], [GPU["cuda"], "CPUExecutionProvider"])
            assert options["trt_fp16_enable"] == options["trt_int8_enable"] == "0"
            folders.append(options["trt_engine_cache_path"])
            assert not folders[-1].startswith(str(opened.path)), "executable code, which others may write there"
            assert (
                os.stat(folders[-1]).st_mode & 0o777 == os.stat(os.path.dirname(folders[-1])).st_mode & 0o777 == 0o700
            )
    assert folders[0].rsplit("/", 1)[1] != folders[1].rsplit("/", 1)[1]
    with pytest.raises(InputError, match=r"(?s)no graph.*student\.int8-trt.*cdl-edge calibrate"):
        load(bundle, "ort-tensorrt", precision="int8")
    with load(bundle, "cuda") as runner:
        assert runner.engine._session.asked == [GPU["cuda"], "CPUExecutionProvider"]


def test_what_a_cpu_is_recommended_is_nothing_for_cuda(make_bundle, monkeypatch):
    import onnxruntime

    advice = {"recommended": {"backend": "onnxruntime", "precision": "int8"}}
    graphs = {"student": "student.onnx", f"student.{INT8}": "student.onnx"}
    bundle = make_bundle(graphs=graphs, quantisation=advice)
    with load(bundle, "onnxruntime", threads=1) as runner:
        assert runner.precision == "int8"
    monkeypatch.setattr(onnxruntime, "original", onnxruntime.InferenceSession, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*GPU.values(), "CPUExecutionProvider"])
    with load(bundle, "cuda", threads=1) as runner:
        assert runner.precision == "fp32"


def test_engines_of_old_versions_go_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = private_folder("ort-engines")
    (folder / "notes").mkdir()
    for number in range(7):
        _kept(folder, f"{number:016x}")
        os.utime(folder / f"{number:016x}", (number, number))
    assert sorted(p.name for p in folder.iterdir()) == [*(f"{number:016x}" for number in range(3, 7)), "notes"]
    folder.chmod(0o777)
    with pytest.raises(InputError, match="others may write here"):
        private_folder("ort-engines")


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("backend", GPU)
def test_a_provider_that_falls_back_silently(bundle, monkeypatch, backend):
    """onnxruntime-gpu lists CUDA even when it cannot load it, and goes on with the CPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    listed = [*GPU.values(), "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(InputError, match="fell back to CPUExecutionProvider"):
        load(bundle, backend)


def test_onnxruntime_is_missing(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        load(bundle)
