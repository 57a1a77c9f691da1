"""The reader of external data locations against the onnx package's own."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from cdl_edge.errors import InputError
from cdl_edge.runtime.external import external_files


def outside(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(graph: onnx.GraphProto, functions: list[onnx.FunctionProto] | None = None) -> bytes:
    return onnx.ModelProto(
        ir_version=10, producer_name="x" * 300, graph=graph, functions=functions or []
    ).SerializeToString()


@pytest.fixture
def read(tmp_path):
    """Returns read(ONNX bytes) -> locations."""

    def write_and_read(content):
        (tmp_path / "graph.onnx").write_bytes(content)
        return external_files(tmp_path / "graph.onnx")

    return write_and_read


def test_initializers(tmp_path, tiny, read):
    assert read(tiny.make_graph(tmp_path)) == {"prompts.bin", "backbone.bin"}
    assert read(tiny.make_graph(tmp_path, location="größe/p.bin")) == {"größe/p.bin", "backbone.bin"}


def test_inside_of_nodes_subgraphs_and_functions(read):
    inner = helper.make_graph([], "inner", [], [], [outside("a", "inner.bin")])
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=inner),
        helper.make_node("Constant", [], ["k"], value=outside("b", "constant.bin")),
        helper.make_node("X", [], ["z"], many=[outside("c", "many.bin")], graphs=[inner]),
        helper.make_node("Constant", [], ["f"], value_float=1.5, name="n" * 200),
    ]
    function = onnx.FunctionProto(
        name="f", domain="d", node=[helper.make_node("Constant", [], ["k"], value=outside("d", "function.bin"))]
    )
    graph = helper.make_graph(nodes, "g", [], [])
    assert read(model(graph, [function])) == {"inner.bin", "constant.bin", "many.bin", "function.bin"}


def test_none(read):
    assert read(model(helper.make_graph([], "g", [], [], [helper.make_tensor("a", 1, [1], [1.0])]))) == set()


def test_broken_bytes(tmp_path, tiny, read):
    good = tiny.make_graph(tmp_path)
    for bad in (good[:-1], good[: len(good) // 2], b"\xff" * 20, b"\x3a\x7f"):
        with pytest.raises(InputError, match=r"graph\.onnx: not an ONNX graph"):
            read(bad)
