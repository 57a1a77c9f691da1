"""Ranges by the graph are those that training keeps."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from cdl_edge.calibrate.collect import collect
from cdl_edge.calibrate.float_graph import FloatGraph
from cdl_edge.data import Split
from cdl_edge.errors import InputError
from cdl_edge.train.batches import Pipeline, TaskImages
from cdl_edge.train.range_keeper import collect as collect_in_training

DEVICE = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "options"),
    [("coda", {}), ("l2p", {"one_pass": True}), ("dualprompt", {"patch": 4}), ("apt", {"kd": None})],
)
def test_as_torch_sees_them(tools, students, learner, options):
    graphs = tools.make(learner, **options)
    side = Pipeline(graphs.student, students.preprocessing, DEVICE)
    images = TaskImages(Split(graphs.pixels, np.zeros(len(graphs.pixels), np.int64)), {"student": side}, DEVICE)
    kept = collect_in_training(images, len(graphs.pixels))
    found = collect(graphs.graph(), graphs.pixels)
    assert found.images == len(graphs.pixels)
    assert set(found.tensors) == {layer.range for layer in graphs.whole().values()}
    assert set(found.tensors) <= set(kept)
    for name, tensor in found.tensors.items():
        one, other = tensor.histogram, kept[name].histogram
        if name == "prompted.blocks.0.qkv" and graphs.student.kd is not None:
            # In the graph the KD token's Q, K and V of the first block are constants: training sees its row too.
            assert one.values * 18 == other.values * 17
            continue
        assert one.values == other.values, name
        assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-3, abs=1e-4), name
        for share in (0.01, 0.3, 0.9, 0.999):
            assert abs(one.percentile(share) - other.percentile(share)) <= 2 * one.width, name
        if name.endswith(("qkv", "fc1")):
            assert np.allclose(tensor.channels, kept[name].channels, rtol=1e-3, atol=1e-4), name
        else:
            assert tensor.channels is None and kept[name].channels is None


def test_images_add_up(tools):
    graphs = tools.make("apt")
    one, other = (collect(graphs.graph(), p).tensors for p in (graphs.pixels[:2], graphs.pixels[2:]))
    for name, tensor in graphs.ranges.items():
        parts = [one[name].histogram, other[name].histogram]
        assert tensor.histogram.values == sum(p.values for p in parts)
        assert tensor.histogram.low == min(p.low for p in parts) and tensor.histogram.high == max(p.high for p in parts)


def test_what_is_not_finite_is_refused(tools, tmp_path):
    graphs = tools.make("apt")
    model = onnx.load(str(graphs.path()), load_external_data=False)
    place = next(t for t in model.graph.initializer if t.name == "blocks.1.fc1.bias")
    offset = next(int(e.value) for e in place.external_data if e.key == "offset")
    content = bytearray((graphs.folder / "backbone.bin").read_bytes())
    content[offset : offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "backbone.bin").write_bytes(content)
    for name in ("student.onnx", "prompts.bin"):
        (tmp_path / name).write_bytes((graphs.folder / name).read_bytes())
    with pytest.raises(InputError, match=r"prompted\.blocks\.1\.fc2: not finite on these images"):
        collect(FloatGraph(tmp_path / "student.onnx", graphs.graph().layers), graphs.pixels)
