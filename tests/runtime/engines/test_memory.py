"""Both ways to the GPU's memory. Proves what is called in which order, on stand-ins; see test_gpu.py for the rest."""

from __future__ import annotations

import gc
import importlib
import platform

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime.engines import cuda_graph, memory


@pytest.fixture(params=["pycuda", "cuda-python"])
def opened(request, kit, monkeypatch):
    """(Memory, the library it stands on) of either kind."""
    library = kit.FakeDriver() if request.param == "pycuda" else kit.FakeRuntime()
    own = "pycuda.driver" if request.param == "pycuda" else "cuda.bindings.runtime"

    def load(name):
        if name == own:
            return library
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", load)
    found = memory.open_memory()
    assert found.name == request.param
    return found, library


def test_bytes_go_there_and_back(opened):
    found, _ = opened
    with found:
        address, sent, got = found.device(12), found.host(12), found.host(12)
        sent[:] = np.arange(12)
        got[:] = 0
        begin = found.mark()
        found.upload(address, sent)
        sent[:] = 0
        found.download(got[:6], address)
        found.synchronize()
        assert found.between_ms(begin, found.mark()) > 0
    np.testing.assert_array_equal(got, [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0])
    assert isinstance(found.stream, int) and found.stream
    found.close()
    found.close()


@pytest.mark.slow
def test_the_primary_context_is_current_only_inside(kit):
    driver = kit.FakeDriver()
    found = memory.PyCuda(driver)
    assert driver.starts == 1 and driver.depth == 0
    with found:
        with found:
            assert driver.depth == 2
        found.device(8)
    assert driver.depth == 0 and driver.balance == 1
    with pytest.raises(ZeroDivisionError), found:
        raise ZeroDivisionError
    assert driver.depth == 0
    found.close()
    gc.collect()
    assert driver.balance == 0 and driver.freed_outside == 0, "pycuda frees with the context current only"


def test_cuda_python_frees_all(kit):
    library = kit.FakeRuntime()
    found = memory.CudaPython(library)
    with found:
        found.device(8), found.host(8), found.device(16)
    assert len(library.memory) == 3
    found.close()
    assert library.memory == {} and library.calls[-1] == "cudaStreamDestroy"


def test_time_stamps_are_used_again(kit):
    library = kit.FakeRuntime()
    found = memory.CudaPython(library)
    with found:
        marks = [found.mark() for _ in range(30)]
    assert len(marks) == library.calls.count("cudaEventRecord") == 30
    found.close()
    assert library.calls.count("cudaEventCreate") == library.calls.count("cudaEventDestroy") == 9


def test_no_memory_left(opened):
    found, library = opened
    if found.name == "pycuda":
        library.full = True
    else:
        library.fail = {"cudaMalloc": 2, "cudaMallocHost": 2}
    with found:
        with pytest.raises(InputError, match="not enough device memory") as caught:
            found.device(1 << 40)
        with pytest.raises(InputError, match="not enough page-locked host memory"):
            found.host(1 << 10)
    assert str(1 << 40) in str(caught.value)


def test_an_error_of_cuda_is_not_swallowed(kit):
    library = kit.FakeRuntime()
    found = memory.CudaPython(library)
    library.fail = {"cudaMemcpyAsync": 999}
    with found, pytest.raises(memory.CudaError, match="cudaMemcpyAsync: cudaErrorUnknown"):
        found.upload(found.device(4), found.host(4))


@pytest.mark.parametrize(
    ("system", "do", "not_do"),
    [
        ("6.8.0-generic", "pip install 'cdl-edge[tensorrt]'", "JetPack"),
        ("5.15.148-tegra", "pip install 'cuda-python>=", "cdl-edge[tensorrt]"),  # the extra is empty there
    ],
)
def test_neither_is_there(monkeypatch, system, do, not_do):
    def load(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(platform, "release", lambda: system)
    with pytest.raises(InputError, match="cannot be reached") as caught:
        memory.open_memory()
    assert "pycuda.driver: No module" in str(caught.value) and "cuda.bindings.runtime: No module" in str(caught.value)
    assert do in str(caught.value) and "pip install pycuda" in str(caught.value)
    assert not_do not in str(caught.value)


def test_pycuda_goes_first(kit, monkeypatch):
    libraries = {"pycuda.driver": kit.FakeDriver(), "cuda.bindings.runtime": kit.FakeRuntime()}
    monkeypatch.setattr(importlib, "import_module", libraries.__getitem__)
    assert memory.open_memory().name == "pycuda"


def test_a_graph_is_recorded_once_and_launched_often(kit):
    library, done = kit.FakeLibcuda(), []
    library.trt = type("Trt", (), {"recording": None})()
    recorded = cuda_graph.CudaGraph(9, lambda: library.trt.recording.append(lambda: done.append(1)), library)
    assert done == []
    recorded.launch(), recorded.launch()
    assert done == [1, 1]
    recorded.close(), recorded.close()
    assert library.calls == [
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
    ]


@pytest.mark.parametrize(
    "step", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "work"]
)
def test_a_recording_that_fails_ends(kit, step):
    library = kit.FakeLibcuda(fail=step)
    library.trt = type("Trt", (), {"recording": None})()

    def work():
        if step == "work":
            raise RuntimeError("work")

    with pytest.raises(RuntimeError, match=step):
        cuda_graph.CudaGraph(9, work, library)
    if step == "work":
        assert "cuStreamEndCapture" in library.calls, "the stream would stay in recording"
