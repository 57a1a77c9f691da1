"""Which layers go into 8 bits, with which numbers, and that the graph computes what these numbers say."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cdl_edge.calibrate.quantize import WEIGHTS
from cdl_edge.calibrate.schemes import SCHEMES
from cdl_edge.calibrate.smooth import smoothing

LEARNERS = ("l2p", "dualprompt", "coda", "apt")
EVERY = ("q", "k", "v", "proj", "fc1", "fc2")


def whole(scope, blocks):
    return {f"{scope}.blocks.{i}.{p}" for i in blocks for p in EVERY}


def last(scope, block):
    """Of the last block only keys and values are asked of all tokens."""
    return {f"{scope}.blocks.{block}.{p}" for p in "kv"}


@pytest.mark.parametrize("learner", LEARNERS)
def test_linears_that_see_all_tokens(tools, learner):
    found = set(tools.make(learner).whole())
    prompted = whole("prompted", range(5)) | last("prompted", 5)
    if learner == "apt":
        assert found == prompted
    else:  # the query pass computes Q, K and V of the first block for both
        shared = {f"prompted.blocks.0.{p}" for p in "qkv"}
        assert found == (prompted - shared) | whole("query", range(5)) | last("query", 5)


@pytest.mark.parametrize("depth", [5, 7])
def test_of_every_depth(tools, depth):
    graphs = tools.make("apt", kd=(3, 2), depth=depth)
    assert set(graphs.whole()) == whole("prompted", range(depth - 1)) | last("prompted", depth - 1)


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "kd"), [("coda", (12, 6)), ("apt", None), ("l2p", None)])
def test_with_many_tokens_the_last_block_has_no_keys_and_values(tools, learner, kd):
    graphs = tools.make(learner, kd=kd, patch=4)
    assert not any(".5." in name for name in graphs.whole())
    quantised = graphs.quantise()
    blocks = tuple(f"blocks.{i}.{p}" for i in range(5) for p in ("qkv", "proj", "fc1", "fc2"))
    assert quantised.units == (*blocks, "stem")
    folder = graphs.write(quantised)
    assert_near(tools, graphs, folder)


@pytest.mark.slow
def test_the_passes_apart_and_one_pass(tools):
    graphs = tools.make("coda")
    assert set(graphs.whole("query")) == whole("query", range(5)) | last("query", 5)
    assert set(graphs.whole("prompted")) == whole("prompted", range(5)) | last("prompted", 5)
    one = tools.make("coda", one_pass=True)
    assert one.names == ("student",)
    assert set(one.whole()) == whole("prompted", range(5)) | last("prompted", 5)


def assert_near(tools, graphs, folder, name="student", tolerance=0.15):
    """8 bits say what fp32 says, but for rounding: of the logits' spread at most a share is lost."""
    feeds = {"images": graphs.pixels}
    expected = tools.run(graphs.path(name), feeds)["logits"]
    got = tools.run(folder / f"{name}.onnx", feeds)["logits"]
    assert np.isfinite(got).all()
    assert not np.array_equal(got, expected)
    assert np.abs(got - expected).max() <= tolerance * np.ptp(expected), np.abs(got - expected).max()


@pytest.mark.quick("l2p-int8-x86", "dualprompt-int8-arm", "coda-int8-trt", "apt-int8-x86")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_in_every_scheme(tools, learner, scheme):
    graphs = tools.make(learner)
    folder = graphs.write(graphs.quantise(scheme))
    for name in graphs.names:
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
    assert_near(tools, graphs, folder)


@pytest.mark.slow
def test_one_pass_without_kd_with_layer_scale_and_heads_of_two_kinds(tools):
    for options in (
        *({"one_pass": True}, {"kd": None}, {"layer_scale": True}, {"qkv_bias": False}, {"stem": "stem"}),
        *({"kd_head": "normalised"}, {"one_pass": True, "query_of": "patches"}),
    ):
        graphs = tools.make("coda", **options)
        assert_near(tools, graphs, graphs.write(graphs.quantise()))


def test_weights_are_bytes_within_half_a_step(tools):
    graphs = tools.make("coda")
    floats = tools.constants(graphs.path())
    stored = tools.constants(graphs.write(graphs.quantise()) / "student.onnx")
    names = {layer.weight for layer in graphs.whole().values()}
    assert len(names) == 32
    for name in names:
        bytes_, steps = stored[f"{name}.int8"], stored[f"{name}.scale"]
        assert bytes_.dtype == np.int8 and bytes_.shape == floats[name].shape
        assert bytes_.min() >= -127  # symmetric
        assert (np.abs(bytes_).max(axis=0) == 127).all()  # every column uses its whole range
        assert np.abs(bytes_ * steps - floats[name]).max(axis=0) == pytest.approx(steps / 2, rel=0.2)
        assert (np.abs(bytes_ * steps - floats[name]) <= steps / 2 * 1.0001).all()
        assert name not in stored  # nobody reads the float weights any more


@pytest.mark.quick("int8-x86", "int8-trt")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_computes_the_quantised_product(tools, scheme):
    """y = (q - z) s_x (W s_w) + b with q = round(x / s_x) + z, worked out by numpy."""
    graphs = tools.make("coda")
    folder = graphs.write(graphs.quantise(scheme, skip=["stem"]))
    nodes, constants = tools.nodes(folder / "student.onnx"), tools.constants(folder / "student.onnx")
    before, floats = tools.nodes(graphs.path()), tools.constants(graphs.path())
    layers = graphs.whole()
    values = sorted({n for name in layers for n in (before[name].input[0], before[name].output[0])})
    got = tools.run(folder / "student.onnx", {"images": graphs.pixels}, values)
    low, high = (-128, 127) if SCHEMES[scheme].symmetric else (0, 255)
    for name in layers:
        x, y = got[before[name].input[0]], got[before[name].output[0]]
        activation = nodes[f"{before[name].input[0]}.quantize"]
        scale, zero = (constants[n] for n in activation.input[1:])
        q = np.clip(np.rint(x / scale) + zero.astype(np.float64), low, high)
        source = before[name].input[1]
        weight = constants[f"{source}.int8"].astype(np.float64) * constants[f"{source}.scale"]
        bias = floats[before[name].input[2]].astype(np.float64)
        step = scale * constants[f"{source}.scale"]
        if SCHEMES[scheme].integer_bias:
            bias = np.rint(bias / step) * step
        expected = (q - zero) * np.float64(scale) @ weight + bias
        assert np.abs(y - expected).max() <= 1e-4 * np.abs(expected).max(), name
        if "blocks.0.q" in name:  # nothing in front of it is rounded: its range covers what it sees here
            assert np.abs((q - zero) * scale - x).max() <= 0.51 * scale, name


@pytest.mark.vnni
@pytest.mark.parametrize("scheme", ["int8-x86"])
def test_the_runtimes_own_kernels_agree(tools, scheme):
    graphs = tools.make("coda")
    folder = graphs.write(graphs.quantise(scheme))
    slow, fast = (
        tools.run(folder / "student.onnx", {"images": graphs.pixels}, as_written=w)["logits"] for w in (True, False)
    )
    assert np.abs(slow - fast).max() <= 0.05 * np.ptp(slow)


@pytest.mark.slow
def test_zero_points_and_biases_of_each_scheme(tools):
    graphs = tools.make("coda")
    for scheme in SCHEMES.values():
        path = graphs.write(graphs.quantise(scheme.name)) / "student.onnx"
        nodes, constants = tools.nodes(path), tools.constants(path)
        zeros = [constants[n.input[2]] for n in nodes.values() if n.op_type == "QuantizeLinear"]
        assert len(zeros) == 41  # Q, K, V share one: 4 a block, the shared first one and two of the last block
        assert {z.dtype for z in zeros} == {np.dtype(np.int8 if scheme.symmetric else np.uint8)}
        if scheme.symmetric:
            assert all(z == 0 for z in zeros)
        else:  # signed values behind a LayerNorm, GELU's just below zero
            assert any(100 < z < 156 for z in zeros) and any(0 < z < 60 for z in zeros)
        for name in graphs.whole():
            reader = nodes[name]
            bias = nodes.get(reader.input[2])
            if scheme.integer_bias:
                assert bias is not None and bias.op_type == "DequantizeLinear"
                assert constants[bias.input[0]].dtype == np.int32
                x_scale = constants[nodes[f"{reader.input[0].removesuffix('.d')}.quantize"].input[1]]
                w_scale = constants[nodes[reader.input[1]].input[1]]
                assert constants[bias.input[1]] == pytest.approx(x_scale * w_scale, rel=1e-6)
            else:
                assert bias is None and constants[reader.input[2]].dtype == np.float32
        for node in nodes.values():
            if node.op_type == "DequantizeLinear":
                assert not scheme.symmetric or not np.any(constants[node.input[2]])


def test_weights_are_read_once_each_for_the_runtimes_fusion(tools):
    graphs = tools.make("coda")
    path = graphs.write(graphs.quantise()) / "student.onnx"
    readers: dict[str, int] = {}
    for node in tools.nodes(path).values():
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    dequantised = [n.output[0] for n in tools.nodes(path).values() if n.op_type == "DequantizeLinear"]
    assert all(readers[n] == 1 for n in dequantised if n.endswith("weight.d"))


def locations(path):
    model = onnx.load(str(path), load_external_data=False)
    return {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}


def test_the_three_graphs_share_their_weights(tools):
    graphs = tools.make("coda")
    quantised = graphs.quantise()
    assert set(quantised.models) == {"student", "query", "prompted"}
    assert set(quantised.constants) == {WEIGHTS, "scales.int8-x86.bin"}
    folder = graphs.write(quantised)
    for name in quantised.models:
        assert locations(folder / f"{name}.onnx") == {"backbone.bin", "prompts.bin", *quantised.constants}
    # Apart they give what they give together: same weights, same scales of each pass.
    query = tools.run(folder / "query.onnx", {"images": graphs.pixels})
    answers = tools.run(folder / "prompted.onnx", {"images": graphs.pixels, **query})
    expected = tools.run(folder / "student.onnx", {"images": graphs.pixels})
    assert query["prompt_weights"] == pytest.approx(expected["prompt_weights"], abs=1e-6)
    assert answers["logits"] == pytest.approx(expected["logits"], abs=1e-5)


@pytest.mark.slow
def test_the_file_of_weights_is_the_same_for_all_schemes_and_whatever_stays_in_float(tools):
    """Flavours of one bundle share it, though the gate may leave other layers of each in float."""
    graphs = tools.make("coda", profile="trt10")
    made = [
        graphs.quantise("int8-x86"),
        graphs.quantise("int8-arm", skip=["blocks.1.fc1"]),
        graphs.quantise("int8-trt", skip=["blocks.0.qkv", "blocks.2.fc2"]),
        graphs.quantise("int8-trt", suffix=".fp16"),
    ]
    assert len({q.constants[WEIGHTS] for q in made}) == 1
    smoothed = [graphs.quantise(f, smooth=0.5, skip=s) for f, s in (("int8-x86", ()), ("int8-arm", ["blocks.1.fc1"]))]
    assert len({q.constants[WEIGHTS] for q in smoothed}) == 1
    assert smoothed[0].constants[WEIGHTS] != made[0].constants[WEIGHTS]


def test_what_is_skipped_stays_as_it_was(tools):
    graphs = tools.make("coda")
    everything = graphs.quantise().units
    some = ["blocks.2.fc1", "blocks.4.qkv"]
    quantised = graphs.quantise(skip=some)
    assert set(quantised.units) == set(everything) - set(some)
    before, after = tools.nodes(graphs.path()), tools.nodes(graphs.write(quantised) / "student.onnx")
    for scope in ("query", "prompted"):
        for part in ("2.fc1", "4.q", "4.k", "4.v"):
            name = f"{scope}.blocks.{part}"
            assert after[name] == before[name]
        assert after[f"{scope}.blocks.2.fc2"] != before[f"{scope}.blocks.2.fc2"]
    # With nothing in 8 bits the graph is the float one.
    nothing = graphs.quantise(skip=everything)
    assert nothing.units == ()
    got = tools.run(graphs.write(nothing) / "student.onnx", {"images": graphs.pixels})["logits"]
    # For an older ONNX Runtime it is written with what Attention is defined as.
    assert np.abs(got - tools.run(graphs.path(), {"images": graphs.pixels})["logits"]).max() < 1e-5


def test_each_pass_has_its_own_ranges(tools):
    graphs = tools.make("coda")
    constants = tools.constants(graphs.write(graphs.quantise()) / "student.onnx")
    for tensor in ("blocks.3.qkv", "blocks.2.fc2"):
        scales = [constants[f"{scope}.{tensor}.scale"] for scope in ("query", "prompted")]
        assert scales[0] != scales[1]
        for scope, scale in zip(("query", "prompted"), scales, strict=True):
            histogram = graphs.ranges[f"{scope}.{tensor}"].histogram
            assert scale == pytest.approx((max(histogram.high, 0) - min(histogram.low, 0)) / 255, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_smoothed_graph_is_the_same_function(tools, strength, scheme):
    """Without the rounding: the LayerNorms of the 8-bit graph with the float weights times their factors."""
    graphs = tools.make("dualprompt", layer_scale=True)
    folder = graphs.write(graphs.quantise(scheme, smooth=strength, skip=["stem"]))
    factors = smoothing(graphs.graph(), graphs.ranges, strength).factors
    floats, before = tools.constants(graphs.path()), tools.nodes(graphs.path())
    model = onnx.load(str(folder / "student.onnx"), load_external_data=False)
    model = onnx.load_from_string(model.SerializeToString())
    onnx.load_external_data_for_model(model, str(folder))
    touched = 0
    for node in model.graph.node:
        if node.name in (layers := graphs.whole()):
            old, layer = before[node.name], layers[node.name]
            weight = floats[old.input[1]]
            smoothed = node.name.rpartition(".")[2] in ("q", "k", "v", "fc1") and ".5." not in node.name
            if smoothed:
                weight = weight * factors[layer.unit][:, None]
                touched += 1
            tensors = [weight.astype(np.float32), floats[old.input[2]]]
            names = [f"{node.name}.float.{k}" for k in range(2)]
            for name, tensor in zip(names, tensors, strict=True):
                model.graph.initializer.append(onnx.numpy_helper.from_array(tensor, name))
            node.input[:] = [old.input[0], *names]
    assert touched == 5 * 4 * 2 - 3  # the first Q, K and V are shared
    norms = [n.input[1] for n in model.graph.node if n.op_type == "LayerNormalization"]
    assert sum(n.endswith(".norm.weight") for n in norms) == 2 * 10 - 1
    (folder / "float.onnx").write_bytes(model.SerializeToString())
    expected = tools.run(graphs.path(), {"images": graphs.pixels})["logits"]
    got = tools.run(folder / "float.onnx", {"images": graphs.pixels})["logits"]
    assert np.abs(got - expected).max() <= 2e-4 * np.ptp(expected)
    assert_near(tools, graphs, folder)


def test_smoothed_scales_cover_the_smoothed_tensor(tools):
    graphs = tools.make("coda")
    folder = graphs.write(graphs.quantise(smooth=0.5))
    nodes, before = tools.nodes(folder / "student.onnx"), tools.nodes(graphs.path())
    constants = tools.constants(folder / "student.onnx")
    layers = {n: la for n, la in graphs.whole().items() if n.rpartition(".")[2] in ("q", "k", "fc1")}
    got = tools.run(folder / "student.onnx", {"images": graphs.pixels}, [before[n].input[0] for n in layers])
    for name in layers:
        x = got[before[name].input[0]]
        scale, zero = (constants[n] for n in nodes[f"{before[name].input[0]}.quantize"].input[1:])
        low, high = -float(zero) * scale, (255 - float(zero)) * scale
        # Within what the tensor's own changes through rounding in front of it allow, and not much wider.
        assert low - 0.1 * (high - low) <= x.min() and x.max() <= high + 0.1 * (high - low), name
        assert high - low <= 1.5 * np.ptp(x), name


@pytest.mark.slow
def test_half_precision_around_the_bytes(tools):
    """int8-trt on the fp16 graphs: what is not in 8 bits is in half precision."""
    for profile in ("trt10", "trt11"):
        graphs = tools.make("coda", profile=profile)
        assert "student.fp16" in graphs.names
        folder = graphs.write(graphs.quantise("int8-trt", suffix=".fp16"))
        nodes, constants = tools.nodes(folder / "student.onnx"), tools.constants(folder / "student.onnx")
        scales = [constants[n.input[1]] for n in nodes.values() if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert {s.dtype for s in scales} == {np.dtype(np.float16)}
        assert all((s > 0).all() for s in scales)
        other = tools.constants(graphs.write(graphs.quantise("int8-trt"), "single") / "student.onnx")
        for name, value in other.items():
            if value.dtype == np.int8 and value.ndim == 2:
                assert np.array_equal(constants[name], value)


@pytest.mark.slow
def test_a_tensor_that_is_always_zero_has_a_scale(tools):
    from dataclasses import replace

    from cdl_edge.ranges import Histogram, TensorRange

    graphs = tools.make("coda", profile="trt10")
    dead = TensorRange(Histogram.of(np.zeros(8, np.float32)))
    ranges = {**graphs.ranges, "query.blocks.1.fc2": dead}
    changed = replace(graphs, ranges=ranges)
    for suffix in ("", ".fp16"):
        path = changed.write(changed.quantise("int8-trt", suffix=suffix)) / "student.onnx"
        tag = ".float16" if suffix else ""
        assert tools.constants(path)[f"query.blocks.1.fc2{tag}.scale"] > 0


def test_ranges_are_chosen_once_for_many_trials(tools, monkeypatch):
    from cdl_edge.calibrate import quantize as module

    graphs, known = tools.make("coda"), {}
    calls = []
    real = module.choose_range
    monkeypatch.setattr(module, "choose_range", lambda *a: calls.append(a) or real(*a))
    paths = {"student": graphs.graph()}
    made = [module.quantise(paths, graphs.ranges, SCHEMES["int8-x86"], "percentile", chosen=known) for _ in range(3)]
    assert len(calls) == len(known) == 41
    assert made[0].constants == made[1].constants == made[2].constants


def test_a_missing_range_is_an_error(tools):
    from dataclasses import replace

    graphs = tools.make("apt")
    without = replace(graphs, ranges={k: v for k, v in graphs.ranges.items() if k != "prompted.blocks.3.fc1"})
    with pytest.raises(KeyError, match=r"prompted\.blocks\.3\.fc1"):
        without.quantise()


def test_a_patch_embedding_takes_the_bytes_as_they_come(tools):
    """U8 with scale 1 is what pixels are: no rounding of them, no Cast, and the product is the one of numpy."""
    graphs = tools.make("coda")
    folder = graphs.write(graphs.quantise(), "stem")
    nodes, before = tools.nodes(folder / "student.onnx"), tools.nodes(graphs.path())
    constants, floats = tools.constants(folder / "student.onnx"), tools.constants(graphs.path())
    stem = nodes["query.stem.0"]
    assert "Cast" in {n.op_type for n in before.values()} and "Cast" not in {n.op_type for n in nodes.values()}
    made = {name: node for node in nodes.values() for name in node.output}
    pixels = made[stem.input[0]]
    assert pixels.op_type == "DequantizeLinear"
    assert (constants[pixels.input[1]], constants[pixels.input[2]]) == (1, 0)
    got = tools.run(folder / "student.onnx", {"images": graphs.pixels}, [stem.output[0]])[stem.output[0]]
    exact = tools.run(graphs.path(), {"images": graphs.pixels}, [before["query.stem.0"].output[0]])
    want = exact[before["query.stem.0"].output[0]]
    step = constants["stem.0.weight.scale"]
    assert np.abs(got - want).max() > 0
    # Half a step for each of 8 x 8 x 3 pixels of at most 255, and half a step of the bias.
    assert (np.abs(got - want) <= 0.5 * step * (255 * 8 * 8 * 3 + 1) + 1e-4).all()
    weight = constants["stem.0.weight.int8"] * step
    assert np.abs(weight - floats["stem.0.weight"]).max() <= 0.501 * step.max()


@pytest.mark.parametrize(
    ("scheme", "profile", "skip"),
    [("int8-arm", "ort", []), ("int8-x86", "openvino", []), ("int8-x86", "ort", ["stem"])],
)
def test_other_patch_embeddings_stay_as_they_are(tools, scheme, profile, skip):
    graphs = tools.make("apt", profile)
    quantised = graphs.quantise(scheme, skip=skip)
    assert "stem" not in quantised.units
    folder = graphs.write(quantised, f"nostem-{scheme}-{len(skip)}")
    assert "Cast" in {n.op_type for n in tools.nodes(folder / "student.onnx").values()}
