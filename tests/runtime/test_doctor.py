"""The doctor answers everywhere, and each missing thing names its remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cdl_edge.runtime import doctor as room
from cdl_edge.runtime import machine
from cdl_edge.runtime.doctor import doctor


def by_name(report):
    return {c["name"]: c for c in report["checks"]}


def test_report():
    report = doctor()
    json.dumps(report)
    checks = by_name(report)
    assert len(checks) == len(report["checks"])
    expected = {
        "python",
        "numpy",
        "pillow",
        "onnxruntime",
        "torch",
        "timm",
        "onnx",
        "openvino",
        "tensorrt",
        "cpu",
        "disk",
    }
    assert expected <= set(checks)
    for check in report["checks"]:
        assert set(check) == {"name", "status", "detail", "fix"}
        assert check["status"] in ("ok", "warn", "fail")
        assert check["detail"]
        assert check["status"] == "ok" or check["fix"], check
    assert checks["numpy"]["status"] == checks["onnxruntime"]["status"] == "ok"
    assert report["ok"] is True


def test_nothing_is_installed(monkeypatch):
    monkeypatch.setattr(room, "version_of", lambda name: None)
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = doctor()
    checks = by_name(report)
    assert report["ok"] is False
    for name in ("numpy", "pillow", "onnxruntime"):
        assert checks[name]["status"] == "fail"
        assert name in checks[name]["fix"]
    for name in ("torch", "timm", "onnx", "scikit-learn"):
        assert checks[name]["status"] == "warn"
        assert checks[name]["fix"] == f"pip install {name}"
    for name in ("openvino", "tensorrt"):
        assert checks[name]["status"] == "ok"
        assert "pip install" in checks[name]["fix"]


def test_a_jetson_needs_no_training_tools(monkeypatch):
    monkeypatch.setattr(room, "version_of", lambda name: None)
    monkeypatch.setattr(room.platform, "release", lambda: "5.15.148-tegra")
    assert by_name(doctor())["torch"]["status"] == "ok"


def test_what_openvino_offers(monkeypatch):
    listed = {"FULL_DEVICE_NAME": "Some CPU", "OPTIMIZATION_CAPABILITIES": ["FP32", "BF16", "INT8", "WINOGRAD"]}
    core = SimpleNamespace(get_property=lambda device, name: listed[name])
    monkeypatch.setattr(room, "version_of", lambda name: "2026.4.1")
    monkeypatch.setattr(room, "import_openvino", lambda: SimpleNamespace(Core=lambda: core))
    found = by_name(doctor())["openvino"]
    assert found["status"] == "ok"
    assert found["detail"] == "2026.4.1, device CPU (Some CPU): fp32, bf16, int8"


def test_an_openvino_that_does_not_start(monkeypatch):
    monkeypatch.setattr(room, "version_of", lambda name: "2026.4.1")
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = by_name(doctor())["openvino"]
    assert found["status"] == "warn"
    assert "cannot be imported" in found["detail"]
    assert "cdl-edge[openvino]" in found["fix"]


def test_two_onnxruntimes(monkeypatch):
    versions = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(room, "version_of", lambda name: versions.get(name))
    found = by_name(doctor())["onnxruntime"]
    assert found["status"] == "warn"
    assert "overwrite each other" in found["detail"]
    assert found["fix"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install ")


def test_an_old_version(monkeypatch):
    monkeypatch.setattr(room, "version_of", lambda name: "1.9.5" if name == "numpy" else "99.0")
    assert by_name(doctor())["numpy"]["status"] == "warn"


def test_a_gpu_without_onnxruntime_gpu(monkeypatch):
    monkeypatch.setattr(room, "cuda_driver", lambda: machine.Driver(1, "NVIDIA driver with 1 GPU(s)"))
    monkeypatch.setattr(room, "version_of", lambda name: None if name == "onnxruntime-gpu" else "99.0")
    found = by_name(doctor())["cuda driver"]
    assert found["status"] == "warn"
    assert "cdl-edge[gpu]" in found["fix"]


def test_a_disk_that_cannot_be_written(monkeypatch):
    def fail() -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(room.tempfile, "TemporaryFile", fail)
    report = doctor()
    assert by_name(report)["disk"]["status"] == "fail"
    assert report["ok"] is False


class Library:
    """Stands in for libcuda."""

    def __init__(self, started: int, count: int) -> None:
        self.started, self.count = started, count

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.started

    def cuDeviceGetCount(self, pointer: object) -> int:  # noqa: N802
        pointer._obj.value = self.count  # type: ignore[attr-defined]
        return 0


@pytest.mark.parametrize(
    ("library", "devices", "said"), [(Library(0, 2), 2, "2 GPU"), (Library(100, 2), 0, "error 100")]
)
def test_cuda_driver(monkeypatch, library, devices, said):
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: library)
    driver = machine.cuda_driver()
    assert driver.devices == devices
    assert said in driver.detail


def test_heavy_packages_are_looked_up_not_imported():
    code = (
        "import sys; from cdl_edge.runtime.doctor import doctor; doctor(); "
        "print([m for m in ('torch', 'timm', 'onnx', 'sklearn', 'tensorrt') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
