"""What importing the rooms of a device brings along, and what it must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cdl_edge

ROOT = Path(cdl_edge.__file__).parent
ROOMS = ("artefacts", "runtime", "updates", "measurement")
MODULES = sorted(
    "cdl_edge." + ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for room in (*ROOMS, "server/live_model.py", "server/notify.py")
    for p in ([ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"))
    if p.name != "__init__.py"
)


def loaded(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_is_light():
    assert loaded("import cdl_edge.runtime") & {"torch", "timm", "onnx", "onnxruntime", "sklearn", "tensorrt"} == set()


def test_every_module_is_light():
    statement = "import " + ", ".join(MODULES)
    assert len(MODULES) >= 10
    assert loaded(statement) & {"torch", "timm", "onnx", "onnxruntime", "sklearn", "tensorrt"} == set()


def test_running_a_bundle_brings_no_training_package(bundle):
    statement = f"from cdl_edge.runtime import load; load({str(bundle.path)!r}, threads=1).close()"
    names = loaded(statement)
    assert "onnxruntime" in names
    assert names & {"torch", "timm", "onnx", "sklearn", "cdl_edge.train.loop", "cdl_edge.export.export_bundle"} == set()
