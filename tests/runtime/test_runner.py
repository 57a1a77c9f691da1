"""A runner over an engine that is no more than the three methods of the contract."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime.runner import Runner, choose_graph


class Doubler:
    """Its logits are a sum over the image; remembers the batches that it was given."""

    def __init__(self, fails: bool = False) -> None:
        self.batches, self.closed = [], 0
        if fails:
            raise InputError("no room")

    def call(self, feeds):
        images = feeds["images"]
        assert images.flags.c_contiguous
        self.batches.append(len(images))
        total = images.reshape(len(images), -1).sum(axis=1, dtype=np.float32)
        return {"logits": np.repeat(total[:, None], 4, axis=1), "prompt_weights": np.zeros((len(images), 2, 3), "f4")}

    def describe(self):
        return {"backend": "toy"}

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(("batch", "batches"), [(1, [1] * 5), (2, [2, 2, 2]), (None, [5])])
def test_an_engine_is_all_that_a_backend_adds(make_bundle, tiny, batch, batches):
    fields = {**tiny.make_manifest()["input"], "shape": [batch or 1, 8, 8, 3], "dynamic_batch": batch is None}
    graph = choose_graph(make_bundle(graph={"batch": batch or "N"}, input=fields))
    given, images = [], np.arange(5 * 192, dtype=np.uint32).astype(np.uint8).reshape(5, 8, 8, 3)
    with Runner.open(graph, lambda model: given.append(model) or Doubler()) as runner:
        logits = runner.infer(images)
        with pytest.raises(InputError, match="uint8"):
            runner.infer(images.astype(np.float32))
    np.testing.assert_array_equal(logits[:, 0], images.reshape(5, -1).sum(axis=1))
    assert runner.engine.batches == batches and runner.engine.closed == 1 and runner.describe() == {"backend": "toy"}
    assert given[0].path == runner.path == graph.path and runner.load_ms > 0


def test_an_engine_that_cannot_be_made(bundle):
    with pytest.raises(InputError, match="no room"):
        Runner.open(choose_graph(bundle), lambda model: Doubler(fails=True))


@pytest.mark.parametrize(
    ("scheme", "backend", "recommended", "chosen"),
    [
        ("int8-x86", "onnxruntime", "onnxruntime", "int8"),
        ("int8-x86", "openvino", "onnxruntime", "fp32"),
        ("int8-x86", "onnxruntime", "openvino", "fp32"),
        ("int8-arm", "onnxruntime", "openvino", "int8"),  # another processor than the one that was measured
        ("int8-x86", "tensorrt", "onnxruntime", "int8"),  # nothing was measured of it
    ],
)
def test_8_bits_are_recommended_for_an_engine(make_bundle, scheme, backend, recommended, chosen):
    """They were taken by every engine, also by one whose answers in 8 bits calibration had refused."""
    timed = [
        {"backend": name, "precision": precision, "compute_ms": 1.0, "ratio": 1.0}
        for name in ("onnxruntime", "openvino")
        for precision in ("fp32", "int8")
    ]
    advice = {"latency": timed, "recommended": {"backend": recommended, "precision": "int8"}}
    graphs = {"student": "student.onnx", f"student.{scheme}": "student.onnx"}
    bundle = make_bundle(graphs=graphs, quantisation=advice)
    assert choose_graph(bundle, int8=scheme, backend=backend).precision == chosen
    assert choose_graph(bundle, precision="int8", int8=scheme, backend=backend).precision == "int8"
