"""The ONNX Runtime backend: right numbers, no silent fallback, a graph that fits its manifest."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.backends.onnxruntime import OrtRunner
from cdl_edge.runtime.bundle import open_bundle
from cdl_edge.runtime.machine import usable_cores


@pytest.fixture
def images():
    """uint8 (5, 8, 8, 3), noise."""
    return np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def expected(tiny, images):
    colour = images.astype(np.float64).mean(axis=(1, 2)) / 255
    return colour @ tiny.HEAD + tiny.BIAS, (colour @ tiny.QUERY).reshape(-1, tiny.BLOCKS, tiny.ENTRIES)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, None])
def test_numbers_for_every_batch_size_of_the_graph(make_bundle, tiny, images, batch):
    fields = tiny.make_manifest()["input"]
    fields |= {"shape": [batch or 1, 8, 8, 3], "dynamic_batch": batch is None}
    bundle = make_bundle(graph={"batch": batch or "N"}, input=fields)
    logits, weights = expected(tiny, images)
    with load(bundle, threads=1) as runner:
        outputs = runner.run(images)
        assert outputs.logits.dtype == np.float32
        np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
        np.testing.assert_allclose(outputs.prompt_weights, weights, atol=1e-5)
        np.testing.assert_array_equal(runner.infer(images), outputs.logits)


def test_an_image_does_not_depend_on_its_neighbours(bundle, images):
    with load(bundle, threads=1) as runner:
        together = runner.infer(images)
        np.testing.assert_array_equal(together, np.concatenate([runner.infer(i[None]) for i in images]))
        np.testing.assert_array_equal(together[::-1], runner.infer(images[::-1]))
        assert np.abs(together[0] - together[1]).max() > 1e-4


def test_no_images(bundle):
    with load(bundle, threads=1) as runner:
        outputs = runner.run(np.zeros((0, 8, 8, 3), np.uint8))
        assert outputs.logits.shape == (0, 4)
        assert outputs.prompt_weights.shape == (0, 2, 3)


def test_a_learner_without_prompt_weights(make_bundle, images):
    bundle = make_bundle(
        graph={"prompt_weights": False}, outputs={"logits": [1, 4]}, selection={"kind": "none", "k": 0, "blocks": []}
    )
    with load(bundle, threads=1) as runner:
        assert runner.run(images).prompt_weights is None


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.int8),
        np.zeros((1, 8, 9, 3), np.uint8),
        np.zeros((1, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((), np.uint8),
        [[1]],
    ],
)
def test_input_of_the_wrong_shape_or_type(bundle, wrong):
    with load(bundle, threads=1) as runner, pytest.raises(InputError, match=r"uint8 \(B, 8, 8, 3\)"):
        runner.run(wrong)


def test_description(bundle):
    import onnxruntime

    with load(bundle, threads=1) as runner:
        assert runner.describe() == {
            "backend": "onnxruntime",
            "providers": ["CPUExecutionProvider"],
            "threads": 1,
            "version": onnxruntime.__version__,
            "precision": "fp32",
        }
        assert runner.load_ms > 0
    with load(bundle) as runner:
        assert runner.describe()["threads"] == usable_cores()


def test_session_options(bundle, monkeypatch):
    import onnxruntime

    seen = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda p, o, **k: seen.append(o) or real(p, o, **k))
    load(bundle, threads=1).close()
    load(bundle, threads=2).close()
    one, two = seen
    assert (one.intra_op_num_threads, two.intra_op_num_threads) == (1, 2)
    assert one.inter_op_num_threads == two.inter_op_num_threads == 1
    assert one.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert one.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_closed(bundle, images):
    runner = load(bundle, threads=1)
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(images)


@pytest.mark.parametrize("name", ["auto", "onnxruntime", "ort", "cpu"])
def test_backend_names(bundle, name):
    with load(bundle.path, name, threads=1) as runner:
        assert runner.describe()["backend"] == "onnxruntime"


def test_an_unknown_backend(bundle):
    with pytest.raises(InputError, match="did you mean 'onnxruntime'"):
        load(bundle, "onnxruntme")
    with pytest.raises(InputError, match="threads"):
        load(bundle, threads=0)
    with pytest.raises(InputError, match="no graph"):
        load(bundle, graph="query")


def test_cuda_that_is_not_built_in(bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="CUDAExecutionProvider cannot be used here"):
        load(bundle, "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_falls_back_silently(bundle, monkeypatch):
    """onnxruntime-gpu lists CUDA even when it cannot load it, and goes on with the CPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(InputError, match="fell back to CPUExecutionProvider"):
        OrtRunner(bundle, provider="cuda")


def test_onnxruntime_is_missing(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        load(bundle)


@pytest.mark.parametrize(
    ("graph", "changes", "named"),
    [
        ({"head": np.ones((3, 5)), "bias": np.ones(5)}, {}, "class count mismatch"),
        ({"side": 9}, {}, "input 'images'"),
        ({"batch": 2}, {}, "input 'images'"),
        ({"batch": "N"}, {}, "input 'images'"),
        ({"input_type": onnx.TensorProto.FLOAT}, {}, r"tensor\(uint8\)"),
        ({"prompt_weights": False}, {}, "outputs"),
        ({}, {"outputs": {"logits": [1, 4], "prompt_weights": [1, 2, 4]}}, "prompt_weights"),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest(make_bundle, graph, changes, named):
    bundle = make_bundle(graph=graph, **changes)
    with pytest.raises(InputError, match=named) as caught:
        load(bundle, threads=1)
    assert "student.onnx" in str(caught.value)


def test_another_input_name(make_bundle, tiny):
    bundle = make_bundle(input={**tiny.make_manifest()["input"], "name": "pixels"})
    with pytest.raises(InputError, match="inputs"):
        load(bundle, threads=1)


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(range(256))])
def test_a_graph_that_is_none(bundle, content):
    """With verify=False a foreign file may come as far as the backend: still one clear message."""
    path = bundle.graph()
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"student\.onnx"):
        OrtRunner(bundle, threads=1)


@pytest.mark.parametrize("location", ["other.bin", "../other.bin", "/etc/hostname"])
def test_constants_outside_of_the_manifest(make_bundle, location):
    """ONNX Runtime itself would read an unlisted file of the folder, past every hash."""
    bundle = make_bundle(graph={"location": location})
    for folder in (bundle.path, bundle.path.parent):
        (folder / "other.bin").write_bytes((bundle.path / "prompts.bin").read_bytes())
    with pytest.raises(InputError, match="does not list"):
        load(open_bundle(bundle.path), threads=1)
