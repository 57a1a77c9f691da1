"""What every backend has to do, asserted alike over all that can run here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.errors import InputError
from cdl_edge.machine import cuda_driver
from cdl_edge.runtime import load

GPU = pytest.mark.gpu


@pytest.fixture(
    params=["onnxruntime", "openvino", *(pytest.param(n, marks=GPU) for n in ("cuda", "ort-tensorrt", "tensorrt"))]
)
def backend(request):
    """Name of a backend that can run on this machine."""
    name = request.param
    if name == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed: pip install 'cdl-edge[openvino]'")
    if name in ("cuda", "ort-tensorrt", "tensorrt") and not cuda_driver().devices:
        pytest.skip(f"backend {name}: {cuda_driver().detail}")
    if wanted := {"cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}.get(name):
        providers = pytest.importorskip("onnxruntime").get_available_providers()
        if wanted not in providers:
            pytest.skip(f"backend {name}: this onnxruntime has only {', '.join(providers)}")
    if name == "tensorrt":
        pytest.importorskip("tensorrt", reason="tensorrt is not installed: pip install 'cdl-edge[tensorrt]'")
    return name


@pytest.fixture
def images():
    """uint8 (5, 8, 8, 3), noise."""
    return np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def expected(tiny, images):
    colour = images.astype(np.float64).mean(axis=(1, 2)) / 255
    return colour @ tiny.HEAD + tiny.BIAS, (colour @ tiny.QUERY).reshape(-1, tiny.BLOCKS, tiny.ENTRIES)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, None])
def test_numbers_for_every_batch_size_of_the_graph(make_bundle, tiny, images, backend, batch):
    fields = tiny.make_manifest()["input"]
    fields |= {"shape": [batch or 1, 8, 8, 3], "dynamic_batch": batch is None}
    bundle = make_bundle(graph={"batch": batch or "N"}, input=fields)
    logits, weights = expected(tiny, images)
    with load(bundle, backend, threads=1) as runner:
        for count in (5, 2, 5):
            outputs = runner.run(images[:count])
            assert outputs.logits.dtype == outputs.prompt_weights.dtype == np.float32
            np.testing.assert_allclose(outputs.logits, logits[:count], atol=1e-5)
            np.testing.assert_allclose(outputs.prompt_weights, weights[:count], atol=1e-5)
            np.testing.assert_array_equal(runner.infer(images[:count]), outputs.logits)


def test_an_image_does_not_depend_on_its_neighbours(bundle, images, backend):
    with load(bundle, backend, threads=1) as runner:
        together = runner.infer(images)
        np.testing.assert_array_equal(together, np.concatenate([runner.infer(i[None]) for i in images]))
        np.testing.assert_array_equal(together[::-1], runner.infer(images[::-1]))
        assert np.abs(together[0] - together[1]).max() > 1e-4


def test_the_caller_owns_what_it_gave_and_got(bundle, images, backend):
    """The engine's memory is used again by the next call; it may neither change the images nor earlier results."""
    given = images[:1].copy()
    given.flags.writeable = False
    with load(bundle, backend, threads=1) as runner:
        first = runner.infer(given)
        kept = first.copy()
        runner.infer(images[1:2])
        np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(given, images[:1])


def test_no_images(bundle, backend):
    with load(bundle, backend, threads=1) as runner:
        outputs = runner.run(np.zeros((0, 8, 8, 3), np.uint8))
        assert outputs.logits.shape == (0, 4)
        assert outputs.prompt_weights.shape == (0, 2, 3)


def test_a_learner_without_prompt_weights(make_bundle, images, backend):
    bundle = make_bundle(
        graph={"prompt_weights": False}, outputs={"logits": [1, 4]}, selection={"kind": "none", "k": 0, "blocks": []}
    )
    with load(bundle, backend, threads=1) as runner:
        assert runner.run(images).prompt_weights is None


@pytest.fixture
def passes(make_bundle, tiny, tmp_path):
    """A bundle with query.onnx and prompted.onnx: prompt weights, and logits plus their sum."""
    whole = make_bundle("whole")
    proto = onnx.load(str(whole.graph()), load_external_data=False)
    images, weights = proto.graph.input[0], proto.graph.output[1]
    nodes = {node.op_type: node for node in proto.graph.node}
    stem = [nodes[kind] for kind in ("Cast", "Mul", "ReduceMean")]
    gemm = helper.make_node("Gemm", [*nodes["Gemm"].input], ["plain"])
    added = [
        helper.make_node("ReduceSum", ["prompt_weights", "axes"], ["sum"], keepdims=0),
        helper.make_node("Unsqueeze", ["sum", "last"], ["column"]),
        helper.make_node("Add", ["plain", "column"], ["logits"]),
    ]
    last = helper.make_tensor("last", TensorProto.INT64, [1], [1])
    constants = {c.name: c for c in [*proto.graph.initializer, last]}
    files = {name: whole.path / name for name in ("student.onnx", "backbone.bin", "prompts.bin")}
    signatures = {"student": {"inputs": {"images": [1, 8, 8, 3]}, "outputs": whole.manifest.document["outputs"]}}
    for name, parts, inputs, outputs in (
        ("query", [*stem, nodes["MatMul"], nodes["Reshape"]], [images], [weights]),
        ("prompted", [*stem, gemm, *added], [images, weights], [proto.graph.output[0]]),
    ):
        used = [constants[c] for c in constants if any(c in node.input for node in parts)]
        graph = helper.make_graph(parts, name, inputs, outputs, used)
        model = onnx.ModelProto(ir_version=9, graph=graph, opset_import=[helper.make_opsetid("", 18)])
        files[f"{name}.onnx"] = model.SerializeToString()
        signatures[name] = {
            kind: {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
            for kind, values in (("inputs", inputs), ("outputs", outputs))
        }
    graphs = {name: f"{name}.onnx" for name in signatures}
    return write_bundle(tmp_path / "passes", tiny.make_manifest(graphs=graphs, signatures=signatures), files)


def test_the_passes_apart(passes, tiny, images, backend):
    logits, weights = expected(tiny, images)
    with (
        load(passes, backend, threads=1, graph="query") as query,
        load(passes, backend, threads=1, graph="prompted") as prompted,
    ):
        found = query.compute({"images": images})["prompt_weights"]
        np.testing.assert_allclose(found, weights, atol=1e-5)
        outputs = prompted.run(images, prompt_weights=found)
        np.testing.assert_allclose(outputs.logits, logits + weights.sum((1, 2))[:, None], atol=1e-5)
        with pytest.raises(InputError, match="gives no logits"):
            query.run(images)
        with pytest.raises(InputError, match="inputs of other names"):
            prompted.run(images)
        for wrong in (found[:, :1], found[:2], found.astype(np.float64)):
            with pytest.raises(InputError, match=r"float32 \(5, 2, 3\)"):
                prompted.run(images, prompt_weights=wrong)


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
def test_input_of_the_wrong_shape_or_type(bundle, backend, wrong):
    with load(bundle, backend, threads=1) as runner, pytest.raises(InputError, match=r"uint8 \(B, 8, 8, 3\)"):
        runner.run(wrong)


def test_description(bundle, backend):
    with load(bundle, backend, threads=1) as runner:
        described = runner.describe()
        assert set(described) >= {"backend", "providers", "threads", "version", "precision"}
        assert described["precision"] == "fp32"
        assert described["threads"] == 1
        assert described["providers"] and described["version"]
        assert runner.load_ms > 0


def test_closed(bundle, images, backend):
    runner = load(bundle, backend, threads=1)
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(images)


def test_refused_before_anything_is_loaded(bundle, backend):
    with pytest.raises(InputError, match="threads"):
        load(bundle, backend, threads=0)
    with pytest.raises(InputError, match="no graph"):
        load(bundle, backend, graph="query")
    with pytest.raises(InputError, match="precision"):
        load(bundle, backend, precision="fp23")


@pytest.mark.parametrize(
    ("graph", "changes", "named"),
    [
        ({"head": np.ones((3, 5)), "bias": np.ones(5)}, {}, "class count mismatch"),
        ({"side": 9}, {}, "input 'images'"),
        ({"batch": 2}, {}, "input 'images'"),
        ({"batch": "N"}, {}, "input 'images'"),
        ({"input_type": TensorProto.FLOAT}, {}, "uint8"),
        ({"prompt_weights": False}, {}, "outputs"),
        ({}, {"outputs": {"logits": [1, 4], "prompt_weights": [1, 2, 4]}}, "prompt_weights"),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest(make_bundle, backend, graph, changes, named):
    bundle = make_bundle(graph=graph, **changes)
    with pytest.raises(InputError, match=named) as caught:
        load(bundle, backend, threads=1)
    assert "student.onnx" in str(caught.value)


def test_a_graph_of_one_image_that_says_any_number(make_bundle, tiny, backend):
    bundle = make_bundle(input={**tiny.make_manifest()["input"], "dynamic_batch": True})
    with pytest.raises(InputError, match="input 'images'"):
        load(bundle, backend, threads=1)


def test_another_input_name(make_bundle, tiny, backend):
    bundle = make_bundle(input={**tiny.make_manifest()["input"], "name": "pixels"})
    with pytest.raises(InputError, match="inputs"):
        load(bundle, backend, threads=1)


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(range(256))])
def test_a_graph_that_is_none(bundle, backend, content):
    """With verify=False a foreign file may come as far as the backend: still one clear message."""
    bundle.graph().write_bytes(content)
    with pytest.raises(InputError, match=r"student\.onnx"):
        load(bundle, backend, threads=1)


@pytest.mark.parametrize("location", ["other.bin", "../other.bin", "/etc/hostname"])
def test_constants_outside_of_the_manifest(make_bundle, backend, location):
    """An engine itself would read an unlisted file of the folder, past every hash."""
    bundle = make_bundle(graph={"location": location})
    for folder in (bundle.path, bundle.path.parent):
        (folder / "other.bin").write_bytes((bundle.path / "prompts.bin").read_bytes())
    with pytest.raises(InputError, match="does not list"):
        load(open_bundle(bundle.path), backend, threads=1)


def test_constants_that_were_replaced(bundle, tiny, images, backend):
    """Who had loaded keeps the old values; the new ones belong to no manifest and are not loaded."""
    with load(bundle, backend, threads=1) as before:
        old = before.infer(images)
        new = bundle.path / "new.bin"
        tables = [2 * tiny.HEAD, tiny.BIAS, tiny.QUERY]
        new.write_bytes(b"".join(t.tobytes() for t in tables))
        new.replace(bundle.path / "prompts.bin")
        np.testing.assert_array_equal(before.infer(images), old)
        with pytest.raises(InputError, match="changed since"):
            load(bundle.path, backend, threads=1, verify=False)


def test_files_overwritten_under_an_open_runner_change_nothing(bundle, images, backend):
    """`cp` writes into the very file that an engine may have mapped."""
    with load(bundle, backend, threads=1) as runner:
        before = runner.run(images)
        for name in ("prompts.bin", "backbone.bin", "student.onnx"):
            size = (bundle.path / name).stat().st_size
            with open(bundle.path / name, "rb+") as stream:
                stream.write(b"\x3f" * size)
        np.testing.assert_array_equal(runner.infer(images), before.logits)
        for name in ("prompts.bin", "backbone.bin", "student.onnx"):
            with open(bundle.path / name, "rb+") as stream:
                stream.truncate(0)
        after = runner.run(images)
    np.testing.assert_array_equal(after.logits, before.logits)
    np.testing.assert_array_equal(after.prompt_weights, before.prompt_weights)


def test_what_changed_after_it_was_opened_is_not_loaded(bundle, backend):
    """Between opening a bundle and loading a graph of it."""
    content = (bundle.path / "prompts.bin").read_bytes()
    (bundle.path / "prompts.bin").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(InputError, match=r"prompts\.bin: changed since"):
        load(bundle, backend, threads=1)


@pytest.mark.parametrize("threads", [2, 8])
def test_one_runner_asked_by_many_threads(bundle, images, backend, threads):
    with load(bundle, backend, threads=1) as runner:
        wanted = [runner.infer(image[None]) for image in images]
        wrong = []

        def ask(offset: int) -> None:
            for i in range(60):
                number = (i + offset) % len(images)
                if not np.array_equal(runner.infer(images[number][None]), wanted[number]):
                    wrong.append(number)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(ask, range(threads)))
    assert wrong == []


def test_a_graph_that_cannot_be_computed(make_bundle, tmp_path, images, backend):
    """It loads, its shapes fit the manifest, and the engine fails when it runs: a message, no trace."""
    whole = make_bundle("whole")
    proto = onnx.load(str(whole.graph()), load_external_data=False)
    next(n for n in proto.graph.node if n.op_type == "Gemm").output[0] = "logits0"
    nodes = [
        helper.make_node("Cast", ["images"], ["wide"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["wide", "all"], ["most"], keepdims=0),
        helper.make_node("Add", ["most", "index"], ["far"]),
        helper.make_node("Gather", ["logits0", "far"], ["logits"], axis=1),
    ]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.append(helper.make_tensor("all", TensorProto.INT64, [4], [0, 1, 2, 3]))
    proto.graph.initializer.append(helper.make_tensor("index", TensorProto.INT64, [4], [0, 1, 2, 3]))
    files = {name: whole.path / name for name in ("backbone.bin", "prompts.bin")}
    files["student.onnx"] = proto.SerializeToString()
    odd = write_bundle(tmp_path / "odd", whole.manifest.document, files)
    if backend != "onnxruntime":
        pytest.skip("this engine clamps indices, or refuses the graph when it is loaded")
    with load(odd, backend, threads=1) as runner, pytest.raises(InputError, match="cannot compute the graph"):
        runner.infer(np.full_like(images, 200))
