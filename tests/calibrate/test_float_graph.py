"""The table of layers that export writes, and what stands in for it where a bundle has none."""

from __future__ import annotations

from dataclasses import asdict

import onnx
import pytest

from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.calibrate.float_graph import FloatGraph, float_graph, named_layers
from cdl_edge.calibrate.quantize import quantise
from cdl_edge.calibrate.schemes import SCHEMES

CASES = [
    ("coda", "ort", {}),
    ("apt", "trt11", {}),
    ("l2p", "openvino", {"kd": None}),
    ("dualprompt", "ort", {"one_pass": True}),
    ("coda", "ort", {"patch": 4}),
    ("coda", "trt10", {}),
]


@pytest.mark.quick("coda-ort-options0", "coda-trt10-options5")
@pytest.mark.parametrize(("learner", "profile", "options"), CASES)
def test_the_table_says_what_the_names_of_the_nodes_say(tools, learner, profile, options):
    """Of a student as every export makes it; bundles from before the table are read by these names."""
    graphs = tools.make(learner, profile, **options)
    for name in graphs.names:
        found = named_layers(graphs.path(name), graphs.student.two_pass)
        assert [asdict(layer) for layer in found] == [asdict(layer) for layer in graphs.graph(name).layers]


@pytest.mark.quick("int8-x86")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_8_bits_from_either(tools, scheme):
    graphs = tools.make("coda", "ort" if scheme != "int8-trt" else "trt10")
    named = {
        n: FloatGraph(graphs.path(n), named_layers(graphs.path(n), True)) for n in ("student", "query", "prompted")
    }
    other = quantise(named, graphs.ranges, SCHEMES[scheme], "max")
    table = quantise({n: graphs.graph(n) for n in named}, graphs.ranges, SCHEMES[scheme], "max")
    assert table.units == other.units
    assert {**table.models, **table.constants} == {**other.models, **other.constants}


def test_every_entry_is_in_its_graph(tools):
    graphs = tools.make("coda", "trt10")
    for name in graphs.names:
        model = onnx.load(str(graphs.path(name)), load_external_data=False)
        nodes = {node.name: node for node in model.graph.node}
        constants = {tensor.name for tensor in model.graph.initializer}
        listed = graphs.graph(name).layers
        assert listed and len({layer.node for layer in listed}) == len(listed)
        for layer in listed:
            assert nodes[layer.node].op_type == "Gemm" and nodes[layer.node].input[0] == layer.input
            assert layer.weight in constants


def test_the_shared_stem(tools):
    """The pass `prompted` alone reads the tokens that the query pass reads: their range is kept once."""
    graphs = tools.make("coda")
    for name in ("student", "query", "prompted"):
        first = [layer for layer in graphs.graph(name).layers if layer.unit == "blocks.0.qkv"]
        assert len(first) == 3 and {layer.range for layer in first} == {"query.blocks.0.qkv"}
    one_pass = tools.make("coda", one_pass=True).graph()
    assert {la.range for la in one_pass.layers if la.unit == "blocks.0.qkv"} == {"prompted.blocks.0.qkv"}


@pytest.mark.slow
def test_a_bundle_with_and_without_its_table(exported, tmp_path):
    bundle = open_bundle(exported())
    assert bundle.manifest.layers == "layers.json"
    files = {name: bundle.path / name for name in bundle.manifest.files if name != "layers.json"}
    document = {key: value for key, value in bundle.manifest.document.items() if key != "layers"}
    older = write_bundle(tmp_path / "older", document, files)
    assert older.manifest.layers is None
    for name in ("student", "query", "prompted"):
        assert tuple(float_graph(bundle, name).layers) == tuple(float_graph(older, name).layers)
