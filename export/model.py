"""From the graph's parts to `student.onnx` and its two files of constants."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .graph import FROZEN, LEARNT, OPSET, Graph

ALIGNMENT = 64
"bytes: a cache line, so that an engine may map the file and use it in place"
IR_VERSION = 11
"what onnxruntime 1.23, the oldest we allow, still reads with opset 23"


@dataclass(frozen=True)
class Artefact:
    """The files of a graph, in memory."""

    model: bytes
    "student.onnx"
    constants: dict[str, bytes]
    "file name -> content"


def pack(constants: dict[str, np.ndarray]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """One file, and name -> (offset, length). Sorted by name: the same constants give the same bytes."""
    content = bytearray()
    where: dict[str, tuple[int, int]] = {}
    for name in sorted(constants):
        content += b"\0" * (-len(content) % ALIGNMENT)
        data = constants[name].tobytes()
        where[name] = (len(content), len(data))
        content += data
    return bytes(content), where


def assemble(graph: Graph, size: int, outputs: dict[str, list[int]], metadata: dict[str, Any]) -> Artefact:
    """The files of a graph. size: side of the input in pixels; outputs: name -> shape behind the batch axis."""
    batch: int | str = graph.batch if graph.batch is not None else "batch"
    files: dict[str, bytes] = {}
    initializers: list[onnx.TensorProto] = []
    for place in (FROZEN, LEARNT):
        files[place], where = pack({n: a for n, a in graph.constants.items() if graph.places[n] == place})
        for name, (offset, length) in where.items():
            array = graph.constants[name]
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", place), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
    initializers += [
        numpy_helper.from_array(array, name) for name, array in graph.constants.items() if graph.places[name] == ""
    ]
    proto = helper.make_graph(
        graph.nodes,
        "student",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, size, size, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape]) for name, shape in outputs.items()],
        initializers,
    )
    model = helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="cdl-edge"
    )
    # For whoever has only the graph: class names and preprocessing travel inside it as JSON.
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    return Artefact(model.SerializeToString(), files)
