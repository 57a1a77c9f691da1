"""Finding TensorRT and the GPU. Proves messages and order of the questions; a stand-in answers for libcuda."""

from __future__ import annotations

import ctypes
import importlib
import platform
import types

import pytest

from cdl_edge import jetson, machine
from cdl_edge.errors import InputError
from cdl_edge.runtime.engines import product

NONE = machine.Driver(0, "no NVIDIA driver (libcuda.so.1 is not there)")


class Libcuda:
    """A driver with one Orin."""

    answer = 0

    def __getattr__(self, name):
        values = {75: 8, 76: 7, "cuDriverGetVersion": 12060, "cuDeviceTotalMem_v2": 8 << 30, "cuDeviceGetCount": 1}

        def call(*arguments):
            if name == "cuDeviceGetName":
                arguments[0].value = b"Orin (nvgpu)"
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = values[arguments[1]]
            elif name in values:
                arguments[0]._obj.value = values[name]
            return self.answer if name.startswith("cuDeviceGetA") else 0

        return call


def test_without_a_driver_tensorrt_is_not_even_imported(monkeypatch):
    monkeypatch.setattr(product, "cuda_driver", lambda: NONE)
    imported = []
    monkeypatch.setattr(importlib, "import_module", lambda name: imported.append(name))
    with pytest.raises(InputError) as caught:
        product.find_gpu()
    assert "libcuda.so.1 is not there" in str(caught.value) and "--backend cpu" in str(caught.value)
    assert imported == []


def test_the_gpu_is_described(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libcuda())
    gpu = product.find_gpu()
    assert gpu == product.Gpu("Orin (nvgpu)", "8.7", "12.6", 8 << 30)
    assert gpu.slug == "orin-nvgpu-sm87"


def test_a_driver_that_does_not_describe_its_gpu(monkeypatch):
    library = Libcuda()
    library.answer = 999
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with pytest.raises(InputError, match="999"):
        product.find_gpu()


@pytest.mark.parametrize(
    ("version", "good"), [("8.6.1", False), ("10.2.0", False), ("10.3.0", True), ("11.4.0.106", True)]
)
def test_versions(monkeypatch, version, good):
    trt = types.SimpleNamespace(__name__="tensorrt", __version__=version)
    monkeypatch.setattr(importlib, "import_module", lambda name: trt)
    if good:
        assert product.find_tensorrt() is trt
    else:
        with pytest.raises(InputError, match="too old") as caught:
            product.find_tensorrt()
        assert version in str(caught.value) and "10.3 or newer" in str(caught.value)


@pytest.mark.parametrize("error", [ImportError("No module named 'tensorrt'"), OSError("libnvinfer.so.10: cannot open")])
@pytest.mark.parametrize(
    ("system", "hint"),
    [
        ("6.8.0-generic", "pip install 'cdl-edge[tensorrt]'"),
        ("5.15.148-tegra", "sudo apt-get install -y tensorrt python3-libnvinfer"),
    ],
)
def test_absent(monkeypatch, error, system, hint):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(platform, "release", lambda: system)
    with pytest.raises(InputError, match="cannot be imported") as caught:
        product.find_tensorrt()
    assert str(error) in str(caught.value) and hint in str(caught.value)


def test_jetson_linux_is_read(monkeypatch):
    line = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025"
    monkeypatch.setattr(jetson, "read_line", lambda path: line if path == "/etc/nv_tegra_release" else None)
    assert product.l4t() == "36.4.3"
    monkeypatch.setattr(jetson, "read_line", lambda path: None)
    assert product.l4t() is None


def test_one_logger_keeps_warnings_and_errors(fake, capsys):
    first = product.logger(fake)
    severity = fake.ILogger.Severity
    for level, text in ((severity.ERROR, "bad "), (severity.WARNING, "odd"), (severity.INFO, "chatter")):
        first.log(level, text)
    assert product.logger(fake) is first
    assert first.take() == ["bad", "odd"] and first.take() == []
    assert capsys.readouterr() == ("", "")
