"""From the graph's parts to `student.onnx` and its two files of constants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..artefacts.layer_table import LayerTable
from ..packing import pack
from .nodes import FROZEN, LEARNT, Graph


@dataclass(frozen=True)
class Artefact:
    """The files of one or more graphs, in memory."""

    models: dict[str, bytes]
    "name of the graph -> the graph without its constants"
    constants: dict[str, bytes]
    "file name -> content"
    layers: LayerTable
    "of all graphs"


def assemble(graphs: Mapping[str, Graph], metadata: dict[str, Any]) -> Artefact:
    """Graphs that share their files of constants. metadata: for whoever has only a graph, kept in it as JSON."""
    files: dict[str, bytes] = {}
    where: dict[str, tuple[str, int, int]] = {}
    for place in (FROZEN, LEARNT):
        constants: dict[str, np.ndarray] = {}
        for graph in graphs.values():
            for name, array in graph.constants.items():
                if graph.places[name] == place and not np.array_equal(constants.setdefault(name, array), array):
                    raise ValueError(f"two graphs have different constants of the name {name!r}")
        files[place], offsets = pack(constants)
        where |= {name: (place, *span) for name, span in offsets.items()}
    layers = LayerTable({name: tuple(graph.layers) for name, graph in graphs.items()})
    return Artefact({name: _model(name, graph, where, metadata) for name, graph in graphs.items()}, files, layers)


def _model(name: str, graph: Graph, where: dict[str, tuple[str, int, int]], metadata: dict[str, Any]) -> bytes:
    batch: int | str = graph.batch if graph.batch is not None else "batch"
    initializers: list[onnx.TensorProto] = []
    read = {name for node in graph.nodes for name in node.input}
    for constant, array in graph.constants.items():
        if constant not in read:
            continue
        if graph.places[constant] == "":
            initializers.append(numpy_helper.from_array(array, constant))
            continue
        tensor = TensorProto(name=constant, data_type=TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in zip(("location", "offset", "length"), where[constant], strict=True):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    proto = helper.make_graph(
        graph.nodes,
        name,
        [helper.make_tensor_value_info(n, kind, [batch, *shape]) for n, (kind, shape) in graph.inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, *shape]) for n, shape in graph.outputs.items()],
        initializers,
    )
    model = helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid("", graph.profile.opset)],
        ir_version=graph.profile.ir,
        producer_name="cdl-edge",
    )
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    return bytes(model.SerializeToString())
