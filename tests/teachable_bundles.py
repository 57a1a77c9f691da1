"""Tiny bundles that a class can be enrolled in: four by four mean colours are the features, no training is needed."""

from __future__ import annotations

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

from cdl_edge.artefacts.bundle import write_bundle
from cdl_edge.class_statistics import ClassStatistics
from cdl_edge.heads import CLOSED_FORM, best_ridge, feature_map

SIDE, CELLS = 8, 4
WIDTH = CELLS * CELLS * 3
RANDOM = 60
"columns of the random projection of ranpac"
CLASSES = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}
"name -> colour of its pictures"
SELECTION = {"kind": "none", "k": 0, "blocks": []}


def pictures(colour: tuple[int, int, int], count: int, seed: int = 0, side: int = 24) -> list[np.ndarray]:
    """Frames uint8 (side, side, 3) of one colour with coarse noise, so that no two are nearly the same."""
    rng = np.random.default_rng([seed, *colour])
    cells = rng.integers(-70, 70, (count, CELLS, CELLS, 3)) + np.array(colour)
    step = side // CELLS
    return list(np.clip(cells.repeat(step, 1).repeat(step, 2), 0, 255).astype(np.uint8))


def different(colour: tuple[int, int, int], count: int, seed: int = 0, side: int = 24) -> list[np.ndarray]:
    """Frames mostly of one colour, so different that real limits call no two of them nearly the same."""
    rng, made = np.random.default_rng([seed, *colour]), []
    for _ in range(count):
        cells = np.where(rng.random((CELLS, CELLS, 1)) < 0.5, np.array(colour), rng.integers(0, 60, (CELLS, CELLS, 3)))
        made.append(cells.repeat(side // CELLS, 0).repeat(side // CELLS, 1).astype(np.uint8))
    return made


def png(frame: np.ndarray) -> bytes:
    """A frame as a file."""
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG")
    return stream.getvalue()


def features(frames: list[np.ndarray], gain: float = 1.0) -> np.ndarray:
    """float32 (N, WIDTH): what the graph gives for frames of any size that CELLS divides."""
    parts = []
    for frame in frames:
        step = len(frame) // CELLS
        cells = frame.reshape(CELLS, step, CELLS, step, 3).mean((1, 3)) / 255
        parts.append(np.tanh(gain * cells).reshape(-1))
    return np.stack(parts).astype(np.float32)


def teachable(
    out: Path, classes: dict[str, tuple[int, int, int]] = CLASSES, head: str = "slda", gain: float = 1.0, **changes: Any
) -> Path:
    """Write such a bundle; `gain` lies in prompts.bin and changes the features, other fields are of the manifest."""
    names, each = list(classes), 20
    frames = [picture for colour in classes.values() for picture in pictures(colour, each, seed=1)]
    kind = feature_map(head, ("patches",), WIDTH, RANDOM)
    labels = np.repeat(np.arange(len(names)), each)
    held = ClassStatistics.of(kind, features(frames, gain), labels, names)
    made = CLOSED_FORM[head][1](held)
    parts = out.parent / f".parts-{out.name}"
    parts.mkdir(parents=True)
    held.save(parts / "statistics.npz")
    learnt = {
        "gain": np.array(gain, np.float32),
        "head.weight": np.ascontiguousarray(made.weight.T, np.float32),
        "head.bias": made.bias.astype(np.float32),
    }
    frozen = {"scale": np.array(1 / 255, np.float32)}
    if (projection := kind.projection()) is not None:
        frozen["projection"] = projection
    initializers = []
    for file, tables in (("prompts.bin", learnt), ("backbone.bin", frozen)):
        offset = 0
        with open(parts / file, "wb") as stream:
            for name, value in tables.items():
                tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape)
                tensor.data_location = TensorProto.EXTERNAL
                for key, text in (("location", file), ("offset", offset), ("length", value.nbytes)):
                    tensor.external_data.add(key=key, value=str(text))
                initializers.append(tensor)
                stream.write(value.tobytes())
                offset += value.nbytes
    initializers.append(helper.make_tensor("flat", TensorProto.INT64, [2], [-1, WIDTH]))
    step = SIDE // CELLS
    last = "features" if projection is None else "mapped"
    nodes = [
        helper.make_node("Cast", ["images"], ["raw"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["raw", "scale"], ["unit"]),
        helper.make_node("Transpose", ["unit"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["cells"], kernel_shape=[step, step], strides=[step, step]),
        helper.make_node("Transpose", ["cells"], ["back"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["back", "gain"], ["louder"]),
        helper.make_node("Tanh", ["louder"], ["bounded"]),
        helper.make_node("Reshape", ["bounded", "flat"], ["features"]),
    ]
    if projection is not None:
        nodes += [
            helper.make_node("MatMul", ["features", "projection"], ["projected"]),
            helper.make_node("Relu", ["projected"], ["mapped"]),
        ]
    nodes.append(helper.make_node("Gemm", [last, "head.weight", "head.bias"], ["logits"]))
    shapes = {"logits": [1, len(names)], "features": [1, WIDTH]}
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        initializers,
    )
    model = onnx.ModelProto(ir_version=9, graph=graph, opset_import=[helper.make_opsetid("", 18)])
    model.metadata_props.add(key="classes", value="[]")
    tested = [picture for colour in classes.values() for picture in pictures(colour, 2, seed=2, side=SIDE)]
    stored = io.BytesIO()
    logits = kind.apply(features(tested, gain)) @ made.weight.T + made.bias
    np.savez_compressed(stored, images=np.stack(tested), logits=logits.astype(np.float32))
    tiny = sys.modules["tiny_bundles"]
    fields: dict[str, Any] = {
        "name": "teachable",
        "classes": names,
        "tasks": [list(range(len(names)))],
        "outputs": shapes,
        "signatures": {"student": {"inputs": {"images": [1, SIDE, SIDE, 3]}, "outputs": shapes}},
        "learner": "frozen",
        "query": "none",
        "selection": SELECTION,
        "selftest": "selftest.npz",
        "statistics": "statistics.npz",
        "ridge": best_ridge(held) if head == "ranpac" else None,
        "accuracy": None,
        "training": {"config": {"head": head, "learner": "frozen"}},
    }
    files: dict[str, Path | bytes] = {
        "student.onnx": model.SerializeToString(),
        "selftest.npz": stored.getvalue(),
        **{name: parts / name for name in ("backbone.bin", "prompts.bin", "statistics.npz")},
    }
    return write_bundle(out, tiny.make_manifest(**{**fields, **changes}), files).path


@pytest.fixture
def make_teachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """make(name="device", classes={...}, head="slda", gain=1.0, ...) -> folder of a bundle, see `teachable`.

    Mean colours are more alike than features of photographs: only the same picture is called a duplicate.
    """
    from cdl_edge.updates import enrolment_checks as checks

    monkeypatch.setattr(checks, "DUPLICATE", 1 - 1e-7)

    def make(name: str = "device", *arguments: Any, **options: Any) -> Path:
        return teachable(tmp_path / name, *arguments, **options)

    return make


@pytest.fixture
def colours() -> ModuleType:
    """This module: test files cannot import it by name (pytest's importlib mode)."""
    return sys.modules[__name__]
