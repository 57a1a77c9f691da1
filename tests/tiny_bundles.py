"""Tiny bundles: a graph whose results can be worked out by hand."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from cdl_edge.artefacts.bundle import Bundle, write_bundle

SIDE = 8
CLASSES = ["red", "green", "blue", "grey"]
# logits = mean colour (of 0 to 1) @ HEAD + BIAS: the class whose channel is brightest, grey when all are equal.
HEAD = np.array([[4, 0, 0, 1.5], [0, 4, 0, 1.5], [0, 0, 4, 1.5]], np.float32)
BIAS = np.array([0, 0, 0, 0.01], np.float32)
BLOCKS, ENTRIES = 2, 3
QUERY = np.array([[1, -2, 0.5, 3, 0, -1], [0, 1, 1, -1, 2, 0.25], [2, 0, -1, 0.5, 1, 1]], np.float32)


def make_graph(
    folder: Path,
    *,
    batch: int | str = 1,
    side: int = SIDE,
    head: np.ndarray = HEAD,
    bias: np.ndarray = BIAS,
    prompt_weights: bool = True,
    input_type: int = TensorProto.UINT8,
    location: str = "prompts.bin",
) -> bytes:
    """The bytes of a graph with external data; writes its prompts.bin and backbone.bin into `folder`."""
    tables = {"head": head.astype(np.float32), "bias": bias.astype(np.float32), "query": QUERY}
    initializers = []
    offset = 0
    with open(folder / "prompts.bin", "wb") as stream:
        for name, value in tables.items():
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, text in (("location", location), ("offset", offset), ("length", value.nbytes)):
                tensor.external_data.add(key=key, value=str(text))
            initializers.append(tensor)
            stream.write(value.tobytes())
            offset += value.nbytes
    scale = np.array(1 / 255, np.float32)
    tensor = TensorProto(name="scale", data_type=TensorProto.FLOAT, dims=[])
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "backbone.bin"), ("offset", 0), ("length", 4)):
        tensor.external_data.add(key=key, value=str(text))
    initializers.append(tensor)
    (folder / "backbone.bin").write_bytes(scale.tobytes())
    initializers.append(helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]))
    initializers.append(helper.make_tensor("blocks", TensorProto.INT64, [3], [-1, BLOCKS, ENTRIES]))
    nodes = [
        helper.make_node("Cast", ["images"], ["raw"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["raw", "scale"], ["unit"]),
        helper.make_node("ReduceMean", ["unit", "axes"], ["colour"], keepdims=0),
        helper.make_node("Gemm", ["colour", "head", "bias"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, head.shape[1]])]
    if prompt_weights:
        nodes.append(helper.make_node("MatMul", ["colour", "query"], ["flat"]))
        nodes.append(helper.make_node("Reshape", ["flat", "blocks"], ["prompt_weights"]))
        outputs.append(helper.make_tensor_value_info("prompt_weights", TensorProto.FLOAT, [batch, BLOCKS, ENTRIES]))
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("images", input_type, [batch, side, side, 3])],
        outputs,
        initializers,
    )
    return onnx.ModelProto(ir_version=9, graph=graph, opset_import=[helper.make_opsetid("", 18)]).SerializeToString()


def make_manifest(**changes: Any) -> dict[str, Any]:
    """A complete manifest for `make_graph`; keyword arguments replace top-level fields."""
    manifest: dict[str, Any] = {
        "name": "tiny",
        "created": "2026-11-21T00:00:00Z",
        "classes": list(CLASSES),
        "tasks": [[0, 1], [2, 3]],
        "input": {
            "name": "images",
            "shape": [1, SIDE, SIDE, 3],
            "layout": "NHWC",
            "dtype": "uint8",
            "dynamic_batch": False,
            "preprocessing": {
                "size": SIDE,
                "resize": SIDE,
                "interpolation": "bilinear",
                "mean": [0.0, 0.0, 0.0],
                "std": [1.0, 1.0, 1.0],
            },
            "normalisation": "in graph",
        },
        "outputs": {"logits": [1, 4], "prompt_weights": [1, BLOCKS, ENTRIES]},
        "learner": "l2p",
        "distiller": "none",
        "query": "one-pass",
        "alpha": 0.5,
        "selection": {"kind": "top-k", "k": 2, "blocks": [0, 1]},
        "backbone": {"source": "test", "identity": "tiny", "width": 3, "depth": 1, "heads": 1},
        "profile": "ort",
        "opset": 18,
        "precision": "fp32",
        "quantisation": None,
        "graphs": {"student": "student.onnx"},
        "accuracy": {
            "average_accuracy": 75.0,
            "forgetting": 10.0,
            "per_task": [50.0, 100.0],
            "images": 8,
            "source": "folder:x",
        },
        "parity": {
            "max_abs_error": 1e-6,
            "mean_abs_error": 1e-7,
            "images": 8,
            "tolerance": 1e-4,
            "top1_agreement": 1.0,
        },
        "training": {
            "config": {"seed": 3},
            "student": {"matrix": [[90.0, None], [80.0, 70.0]], "average_accuracy": 75.0, "forgetting": 10.0},
        },
        "versions": {"cdl-edge": "0.1.0"},
    }
    return {**manifest, **changes}


BundleMaker = Callable[..., Bundle]


@pytest.fixture
def make_bundle(tmp_path: Path) -> BundleMaker:
    """Returns make(name="bundle", graph={...}, **manifest fields) -> Bundle."""

    def make(name: str = "bundle", graph: dict[str, Any] | None = None, **changes: Any) -> Bundle:
        parts = tmp_path / f".parts-{name}"
        parts.mkdir(exist_ok=True)
        model = make_graph(parts, **(graph or {}))
        files: dict[str, Path | bytes] = {
            "student.onnx": model,
            "backbone.bin": parts / "backbone.bin",
            "prompts.bin": parts / "prompts.bin",
        }
        return write_bundle(tmp_path / name, make_manifest(**changes), files, True)

    return make


@pytest.fixture
def bundle(make_bundle: BundleMaker) -> Bundle:
    """The plain tiny bundle: batch 1, four classes in two tasks, top-k selection."""
    return make_bundle()


def plain(colour: tuple[int, int, int], side: int = SIDE) -> np.ndarray:
    """A picture of one colour: uint8 (side, side, 3)."""
    return np.broadcast_to(np.array(colour, np.uint8), (side, side, 3)).copy()


def png(colour: tuple[int, int, int], side: int = SIDE) -> bytes:
    """The same as an encoded PNG."""
    stream = io.BytesIO()
    Image.fromarray(plain(colour, side)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def manifest() -> Callable[..., dict[str, Any]]:
    """`make_manifest`."""
    return make_manifest


@pytest.fixture
def tiny() -> ModuleType:
    """This module: test files cannot import it by name (pytest's importlib mode)."""
    return sys.modules[__name__]


@pytest.fixture
def make_version(tmp_path: Path) -> Callable[..., Path]:
    """make(number, classes=4, salt=0) -> folder of a bundle with a self-test: the same model after one more task.

    Versions of the same salt share the backbone; each has one class more, and answers otherwise than all others.
    """

    def make(number: int, classes: int = 4, salt: int = 0, **changes: Any) -> Path:
        count = classes + number
        everything = np.random.default_rng(7).normal(size=(3, 1000)).astype(np.float32)
        head, bias = everything[:, :count].copy(), np.full(count, number, np.float32)
        parts = tmp_path / f".version-{number}-{salt}"
        parts.mkdir(exist_ok=True)
        model = make_graph(parts, head=head, bias=bias)
        images = np.random.default_rng(number).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
        logits = (images / 255).mean((1, 2)).astype(np.float32) @ head + bias
        stored = io.BytesIO()
        np.savez_compressed(stored, images=images, logits=logits)
        files: dict[str, Path | bytes] = {
            "student.onnx": model,
            "backbone.bin": (parts / "backbone.bin").read_bytes() + bytes([salt]) * 4096,
            "prompts.bin": parts / "prompts.bin",
            "selftest.npz": stored.getvalue(),
        }
        fields: dict[str, Any] = {
            "name": "tiny",
            "created": f"2026-11-21T00:{number:02d}:00Z",
            "classes": [f"class {i}" for i in range(count)],
            "tasks": [[i] for i in range(count)],
            "outputs": {"logits": [1, count], "prompt_weights": [1, BLOCKS, ENTRIES]},
            "selftest": "selftest.npz",
        }
        return write_bundle(tmp_path / f"v{number}-{salt}", make_manifest(**fields, **changes), files, True).path

    return make


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, by its content."""
    return {
        str(p.relative_to(folder)): f"-> {p.readlink()}"
        if p.is_symlink()
        else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


@pytest.fixture
def contents() -> Callable[[Path], dict[str, str]]:
    """`snapshot`."""
    return snapshot
