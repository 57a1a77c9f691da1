"""Graphs that older runtimes load: no operator younger than opset 21, the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cdl_edge.calibrate.opset import EVERYWHERE, here, lower, opset_of
from cdl_edge.calibrate.quantize import quantise
from cdl_edge.calibrate.schemes import get_scheme


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["coda", "apt"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["one image", "any batch"])
def test_the_same_numbers_without_attention(tools, learner, dynamic):
    graphs = tools.make(learner)
    model = onnx.load(str(graphs.path()), load_external_data=False)
    assert opset_of(model) == 23 and any(n.op_type == "Attention" for n in model.graph.node)
    if dynamic:  # shapes of the batch come from the input, not from the graph
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    lower(model)
    assert opset_of(model) == EVERYWHERE and not any(n.op_type == "Attention" for n in model.graph.node)
    path = graphs.folder / "lowered.onnx"
    path.write_bytes(model.SerializeToString())
    if not dynamic:
        onnx.checker.check_model(str(path), full_check=True)
    got = tools.run(path, {"images": graphs.pixels})["logits"]
    assert np.abs(got - tools.run(graphs.path(), {"images": graphs.pixels})["logits"]).max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8-x86", "int8-arm"])
def test_8_bits_in_the_older_dialect(tools, scheme):
    if here() is not None:
        pytest.skip("this ONNX Runtime loads no other dialect")
    graphs = tools.make("coda")
    paths = {n: graphs.graph(n) for n in ("student", "query", "prompted")}
    new, old = (quantise(paths, graphs.ranges, get_scheme(scheme), "max", opset=opset) for opset in (None, EVERYWHERE))
    assert new.constants == old.constants  # one file of weights for both
    folders = graphs.write(new, "new"), graphs.write(old, "old")
    for name in paths:
        path = folders[1] / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        assert opset_of(onnx.load(str(path), load_external_data=False)) == EVERYWHERE
    a, b = (tools.run(f / "student.onnx", {"images": graphs.pixels})["logits"] for f in folders)
    assert np.abs(a - b).max() <= 0.02 * np.ptp(a)


def test_what_is_old_enough_is_left_alone(tools):
    model = onnx.load(str(tools.make("coda", "trt10").path()), load_external_data=False)
    before = model.SerializeToString()
    lower(model)
    assert model.SerializeToString() == before
