"""The doctor answers everywhere, and each missing thing names its remedy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cdl_edge import machine
from cdl_edge.measurement import doctor as room
from cdl_edge.measurement.doctor import doctor


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
        assert checks[name]["status"] == "ok"  # a device runs without
        assert checks[name]["fix"] == "pip install 'cdl-edge[train]'"
    for name in ("openvino", "tensorrt"):
        assert checks[name]["status"] == "ok"
        assert "pip install" in checks[name]["fix"]


def test_what_openvino_offers(monkeypatch):
    listed = {"FULL_DEVICE_NAME": "Some CPU", "OPTIMIZATION_CAPABILITIES": ["FP32", "BF16", "INT8", "WINOGRAD"]}
    core = SimpleNamespace(get_property=lambda device, name: listed[name])
    monkeypatch.setattr(room, "version_of", lambda name: "2026.4.1")
    monkeypatch.setattr(room, "core", lambda: core)
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


# -- what the machine is good for --------------------------------------------------------------------------------------


def test_each_purpose_and_what_mends_it(monkeypatch):
    monkeypatch.setattr(room, "version_of", lambda name: None)
    monkeypatch.setattr(room, "cuda_driver", lambda: machine.Driver(0, "no NVIDIA driver"))
    find = importlib.util.find_spec
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None if name == "cv2" else find(name))
    checks = by_name(doctor())
    assert {n: c["status"] for n, c in checks.items() if n.startswith("to ")} == {
        "to train": "ok",
        "to export": "ok",
        "to calibrate": "ok",
        "to run on the CPU": "fail",
        "to run on an NVIDIA GPU": "ok",
        "to serve": "ok",
        "to watch a camera or a video": "ok",
        "to sign packs, or check who signed": "ok",
    }
    assert checks["to export"]["fix"] == "pip install 'cdl-edge[train]'"
    assert checks["to serve"]["detail"] == "no: starlette, uvicorn, python-multipart missing"
    assert checks["to serve"]["fix"] == "pip install 'cdl-edge[serve]'"
    assert checks["to watch a camera or a video"]["fix"] == "pip install 'cdl-edge[watch]'"


def test_every_purpose_is_served(monkeypatch):
    monkeypatch.setattr(room, "version_of", lambda name: "99.0")
    monkeypatch.setattr(room, "cuda_driver", lambda: machine.Driver(1, "NVIDIA driver with 1 GPU(s)"))
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: object())
    engine = SimpleNamespace(get_property=lambda device, name: [] if name.endswith("S") else "CPU")
    monkeypatch.setattr(room, "core", lambda: engine)
    found = [c for c in doctor()["checks"] if c["name"].startswith("to ")]
    assert len(found) == 9
    assert all((c["status"], c["detail"], c["fix"]) == ("ok", "yes", None) for c in found)


@pytest.fixture
def jetson(tmp_path, monkeypatch):
    """make(release=..., files={path: text}) -> root of a Jetson without any package."""

    def make(release="R36 (release), REVISION: 4.3", files=()):
        given = {
            "etc/nv_tegra_release": f"# {release}, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
            "etc/nvpmodel.conf": "# a comment\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
            "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< POWER_MODEL ID=3 NAME=7W >\n",
            "var/lib/nvpmodel/status": "pmode:0001\n",
            "proc/meminfo": "MemTotal:        7802000 kB\nMemFree: 1 kB\n",
            "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 650000 0 5\n",
            **dict(files),
        }
        for name, text in given.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(room, "version_of", lambda name: None)
        monkeypatch.setattr(room.platform, "release", lambda: "5.15.148-tegra")
        monkeypatch.setattr(room, "cuda_driver", lambda: machine.Driver(1, "NVIDIA driver with 1 GPU(s)"))
        return tmp_path

    return make


def test_a_jetson_of_8_gb(jetson, monkeypatch):
    monkeypatch.setattr(room.sys, "version_info", (3, 10, 12))
    checks = by_name(doctor(jetson()))
    assert (checks["jetpack"]["status"], checks["jetpack"]["detail"]) == ("ok", "JetPack 6 (Jetson Linux R36.4.3)")
    assert checks["power mode"]["status"] == "warn"
    assert checks["power mode"]["detail"].startswith("1 (25W); 2 is")
    assert "sudo nvpmodel -m 2 && sudo jetson_clocks" in checks["power mode"]["fix"]
    assert checks["swap"]["status"] == "warn" and "swapon" in checks["swap"]["fix"]
    assert "7.4 GiB memory, 0.6 GiB zram, 0.0 GiB on disk; zram takes" in checks["swap"]["detail"]
    assert checks["to train"]["status"] == "ok"
    tensorrt = checks["to run on the GPU by TensorRT"]
    assert tensorrt["status"] == "warn"
    assert tensorrt["detail"] == "no: tensorrt, cuda-python missing"
    assert tensorrt["fix"] == (
        "sudo apt-get install -y tensorrt python3-libnvinfer && pip install 'cuda-python>=12.6,<13'"
    )
    assert checks["to run on the GPU by ONNX Runtime"]["status"] == "ok"


def test_a_jetson_that_is_well_set_up(jetson, monkeypatch):
    swaps = "Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n"
    files = {"var/lib/nvpmodel/status": "pmode:0002\n", "proc/swaps": swaps}
    root = jetson("R39 (release), REVISION: 2.1", files)
    monkeypatch.setattr(room.sys, "version_info", (3, 12, 3))
    checks = by_name(doctor(root))
    assert checks["jetpack"]["detail"] == "JetPack 7 (Jetson Linux R39.2.1)"
    assert {checks[n]["status"] for n in ("jetpack", "power mode", "swap")} == {"ok"}
    assert "'cuda-python>=13,<14'" in checks["to run on the GPU by TensorRT"]["fix"]


@pytest.mark.parametrize(
    ("release", "status", "said"),
    [
        ("R35 (release), REVISION: 4.1", "fail", "too old"),
        ("R36 (release), REVISION: 4.3", "warn", "built for Python 3.10"),
        ("R99 (release), REVISION: 1.0", "ok", "does not know"),
    ],
)
def test_jetpacks(jetson, monkeypatch, release, status, said):
    monkeypatch.setattr(room.sys, "version_info", (3, 11, 9))
    found = by_name(doctor(jetson(release)))["jetpack"]
    assert found["status"] == status
    assert said in found["detail"]


def test_a_board_that_says_little(jetson):
    root = jetson(files={"var/lib/nvpmodel/status": "", "etc/nvpmodel.conf": "", "proc/meminfo": "", "proc/swaps": ""})
    checks = by_name(doctor(root))
    assert checks["power mode"]["status"] == checks["swap"]["status"] == "ok"


def test_a_tensorrt_that_the_environment_does_not_see(jetson, monkeypatch):
    root = jetson(files={"usr/lib/python3.10/dist-packages/tensorrt/__init__.py": ""})
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(room.sys, "prefix", "/home/me/.venv")
    monkeypatch.setattr(room.sys, "base_prefix", "/usr")
    checks = by_name(doctor(root))
    assert checks["tensorrt"]["status"] == "warn"
    assert "--system-site-packages" in checks["tensorrt"]["fix"]
    assert checks["to run on the GPU by TensorRT"]["fix"].startswith("make the environment again with: python3 -m venv")


def test_no_jetson_no_lines_about_one(tmp_path):
    assert not {"jetpack", "power mode", "swap"} & set(by_name(doctor(tmp_path)))


def test_heavy_packages_are_looked_up_not_imported():
    code = (
        "import sys; from cdl_edge.measurement.doctor import doctor; doctor(); "
        "print([m for m in ('torch', 'timm', 'onnx', 'sklearn', 'tensorrt') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
