"""The reader of external data locations against the onnx package's own."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cdl_edge.artefacts.external import external_files, external_records, graph_digest, head_of, inlined
from cdl_edge.errors import InputError


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


def test_records_tell_where_each_constant_stands(tmp_path, tiny):
    path = tmp_path / "graph.onnx"
    path.write_bytes(tiny.make_graph(tmp_path))
    records = {record.name: record for record in external_records(path)}
    assert set(records) == {"head", "bias", "query", "scale"}
    for own, value in (("head", tiny.HEAD), ("bias", tiny.BIAS), ("query", tiny.QUERY)):
        assert (records[own].location, records[own].dims, records[own].dtype) == ("prompts.bin", value.shape, "float32")
        np.testing.assert_array_equal(records[own].read(tmp_path), value)
    assert records["scale"].dims == () and records["scale"].read(tmp_path) == np.float32(1 / 255)


@pytest.mark.parametrize("packed", [True, False])
def test_records_read_dims_in_either_form(tmp_path, packed):
    """protobuf packs repeated numbers in one field or writes one field each; both are valid."""
    tensor = outside("a", "x.bin")
    dims = b"\x0a\x02\x02\x03" if packed else b"\x08\x02\x08\x03"
    del tensor.dims[:]
    content = dims + tensor.SerializeToString()
    graph = b"\x2a" + bytes([len(content)]) + content
    (tmp_path / "graph.onnx").write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert [record.dims for record in external_records(tmp_path / "graph.onnx")] == [(2, 3)]


def test_a_record_longer_than_its_file(tmp_path, tiny):
    path = tmp_path / "graph.onnx"
    path.write_bytes(tiny.make_graph(tmp_path))
    (tmp_path / "prompts.bin").write_bytes((tmp_path / "prompts.bin").read_bytes()[:-4])
    record = next(r for r in external_records(path) if r.name == "query")
    with pytest.raises(InputError, match="'query' is not whole"):
        record.read(tmp_path)


def test_records_of_a_type_that_numpy_lacks(tmp_path):
    tensor = outside("a", "x.bin")
    tensor.data_type = TensorProto.BFLOAT16
    (tmp_path / "graph.onnx").write_bytes(model(helper.make_graph([], "g", [], [], [tensor])))
    with pytest.raises(InputError, match="not an ONNX graph"):
        external_records(tmp_path / "graph.onnx")


def test_a_digest_is_of_what_is_computed(tmp_path, tiny):
    def digest(changed=lambda proto: None, **options):
        proto = onnx.load_from_string(tiny.make_graph(tmp_path, **options))
        changed(proto)
        (tmp_path / "graph.onnx").write_bytes(proto.SerializeToString())
        return graph_digest(tmp_path / "graph.onnx")

    same = digest()
    assert digest(head=tiny.HEAD * 2) == same, "the values stand in another file"
    assert digest(lambda p: helper.set_model_props(p, {"classes": "others"})) == same
    wider = np.concatenate([tiny.HEAD, tiny.HEAD], axis=1)
    assert digest(head=wider, bias=np.tile(tiny.BIAS, 2)) != same
    assert digest(batch=2) != same
    assert digest(lambda p: setattr(p.opset_import[0], "version", 19)) != same
    assert digest(lambda p: setattr(p.graph.node[0], "op_type", "Identity")) != same


def test_sparse_tensors(read):
    """Of a graph, and of a node: an engine reads their files too."""

    def sparse(name: str) -> onnx.SparseTensorProto:
        values = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        values.external_data.add(key="location", value=f"{name}.bin")
        indices = helper.make_tensor(f"{name}_indices", TensorProto.INT64, [1], [0])
        return helper.make_sparse_tensor(values, indices, [4])

    node = helper.make_node("Constant", [], ["x"], sparse_value=sparse("inside"))
    graph = helper.make_graph([node], "g", [], [])
    graph.sparse_initializer.append(sparse("beside"))
    whole = helper.make_model(graph)
    whole.training_info.add().algorithm.sparse_initializer.append(sparse("trained"))
    assert read(whole.SerializeToString()) == {"inside.bin", "beside.bin", "trained.bin"}


def test_nested_deeper_than_python_recurses(read):
    graph = helper.make_graph([], "g", [], [], [outside("deep", "deep.bin")])
    content = graph.SerializeToString()
    for _ in range(3000):
        for field in (6, 5, 1):  # attribute.g, node.attribute, graph.node
            content = head_of(field, len(content)) + content
    assert external_files(head_of(7, len(content)) + content) == {"deep.bin"}


def test_inlined(tmp_path, tiny):
    """The same numbers, from one piece."""
    apart = tiny.make_graph(tmp_path)
    contents = {n: np.fromfile(tmp_path / n, np.uint8) for n in ("prompts.bin", "backbone.bin")}
    whole = inlined(apart, contents)
    assert external_files(whole) == set()
    proto = onnx.load_from_string(whole)
    onnx.checker.check_model(proto, full_check=True)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    np.testing.assert_array_equal(values["head"], tiny.HEAD)
    np.testing.assert_array_equal(values["query"], tiny.QUERY)
    with pytest.raises(InputError, match="not whole"):
        inlined(apart, {**contents, "prompts.bin": contents["prompts.bin"][:-4]})
