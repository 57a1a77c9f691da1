"""Every TensorRT, CUDA and pycuda name in the product, against the real bindings.

Proves: the names exist in TensorRT 10.3 to 11.4 (recorded by read_bindings.py from the wheels), in the installed
tensorrt_rtx, and in the installed cuda-python. Does not prove what they do.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOM = Path(__file__).parents[3] / "runtime" / "engines"
RECEIVERS = {
    "build.py": {
        "attention": "IAttention",
        "builder": "Builder",
        "config": "IBuilderConfig",
        "error": "ParserError",
        "layer": "ILayer",
        "messages": "ILogger",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "profile": "IOptimizationProfile",
        "tensor": "ITensor",
        "get_timing_cache": "ITimingCache",
    },
    "achieved.py": {"engine": "ICudaEngine", "create_engine_inspector": "EngineInspector"},
    "refit.py": {"engine": "ICudaEngine", "refitter": "Refitter"},
    "engine_session.py": {
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "_context": "IExecutionContext",
        "kind": "DataType",
    },
    "product.py": {},
}
"file -> variable, or method whose result is used at once -> class of TensorRT"
AFTER_A_CAST = {"ILayer.attention": "IAttentionInputLayer.attention"}
OWN = {"take", "lines"}
"methods of our own logger"
LATER = {
    "LayerType.ATTENTION_INPUT",
    "IAttentionInputLayer",
    "IAttentionInputLayer.attention",
    "IAttention.decomposable",
}
"the operator Attention came with 10.14: older versions are asked with getattr first"
PYCUDA = {
    "Context": {"pop"},
    "Device": {"retain_primary_context"},
    "": {"init", "mem_alloc", "pagelocked_empty", "memcpy_htod_async", "memcpy_dtoh_async", "MemoryError"},
}
"read in pycuda 2026.1's wrap_cudadrv.cpp, which cannot be built here; it has no CUDA graphs"


def identifier(node: ast.expr) -> str | None:
    """The last name of what an attribute is taken of: `self._context` -> _context, `f(x)` -> f."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def used_names() -> set[str]:
    """`Class.name` and module-level names of TensorRT in the product's sources."""
    found = set()
    for path in ROOM.glob("*.py"):
        known = RECEIVERS.get(path.name, {})
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            if chain := re.match(r"(?:self\.)?_?trt\.([A-Z]\w*|nptype)(?:\.(\w+))?(?:\.(\w+))?$", ast.unparse(node)):
                parts = [part for part in chain.groups() if part and not part.startswith("_")]
                found.add(".".join(parts[:2]))
            owner = known.get(identifier(node.value) or "")
            if owner and not node.attr.startswith("_") and node.attr not in OWN:
                name = f"{owner}.{node.attr}"
                found.add(AFTER_A_CAST.get(name, name))
        for text in re.findall(r'getattr\(trt\.(\w+), "(\w+)"', path.read_text()):
            found.add(".".join(text))
    return found


@pytest.fixture(scope="module")
def recorded():
    """bindings.json."""
    return json.loads(Path(__file__).with_name("bindings.json").read_text())


def test_the_names_in_use_are_those_that_were_checked(recorded):
    assert used_names() == set(recorded["lacking"]), "run tests/runtime/engines/read_bindings.py"
    assert len(used_names()) > 60
    must = {"Builder.build_serialized_network", "Refitter.set_named_weights", "IExecutionContext.execute_async_v3"}
    assert must <= used_names()


def test_all_versions_have_them(recorded):
    assert recorded["versions"][0].startswith("10.3") and recorded["versions"][-1].startswith("11.4")
    for name, versions in recorded["lacking"].items():
        if name in LATER:
            assert versions == ["10.3.0", "10.7.0", "10.13.2.6"], name
        else:
            assert versions == [], f"{name} is missing in {versions}"


def test_tensorrt_rtx_has_them():
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: its real bindings go unread")
    for name in used_names():
        owner, _, attribute = name.partition(".")
        assert hasattr(trt, owner), name
        assert not attribute or hasattr(getattr(trt, owner), attribute), name


def cuda_names() -> set[str]:
    """Functions of CUDA's runtime that memory.py calls by name."""
    return set(re.findall(r'"(cuda[A-Z]\w+)"', (ROOM / "memory.py").read_text())) | {"cudaMemcpyKind"}


def test_cuda_python_has_them():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    names = cuda_names()
    assert len(names) == 16
    kinds = {n for n in names if n.startswith("cudaMemcpy") and "To" in n}
    assert {n for n in names - kinds if not hasattr(runtime, n)} == set()
    assert kinds and all(hasattr(runtime.cudaMemcpyKind, n) for n in kinds)


def test_pycuda_is_used_as_its_source_has_it():
    tree = ast.parse((ROOM / "memory.py").read_text())
    own = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "PyCuda")
    used = set(re.findall(r"driver\.(\w+)(?:\(0\))?(?:\.(\w+))?", ast.unparse(own)))
    flat = {name for pair in used for name in pair if name}
    assert flat - {"Stream", "Event", "ModuleType"} == set().union(*PYCUDA.values()) | {"Context", "Device"}


def test_libraries_are_imported_by_name_only_where_they_are_needed():
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {n.split(".")[0] for n in names} & {"tensorrt", "tensorrt_rtx", "pycuda", "cuda"}, path
        assert "autoinit" not in re.sub(r'"""[\s\S]*?"""', "", path.read_text())
    assert importlib.import_module("cdl_edge.runtime.engines.memory")
