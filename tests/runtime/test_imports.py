"""What importing the runtime brings along, and what it must not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import cdl_edge.runtime

ROOM = Path(cdl_edge.runtime.__file__).parent
MODULES = sorted(
    "cdl_edge.runtime." + ".".join(p.relative_to(ROOM).with_suffix("").parts)
    for p in ROOM.rglob("*.py")
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
    assert names & {"torch", "timm", "onnx", "sklearn", "cdl_edge.train", "cdl_edge.export"} == set()


def test_the_room_imports_no_other_room():
    allowed = {"", "arrays", "cores", "errors", "extras", "files", "decoder", "decoders", "images", "data", "runtime"}
    for path in ROOM.rglob("*.py"):
        depth = len(path.relative_to(ROOM.parent).parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                assert (node.module or "").split(".")[0] in allowed, f"{path}: {node.module}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in {"torch", "timm", "onnx", "cdl_edge", "pickle"}, f"{path}: {name}"
