"""The OpenVINO backend: no precision but the one asked for, and what only this engine can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cdl_edge.artefacts.bundle import write_bundle
from cdl_edge.cores import default_threads
from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.backends import openvino as room

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'cdl-edge[openvino]'")
OFFERED = room.precisions(room.core())
needs_bf16 = pytest.mark.skipif("bf16" not in OFFERED, reason="this CPU computes no bfloat16")


@pytest.fixture
def images():
    """uint8 (5, 8, 8, 3), noise."""
    return np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def mixer(folder, constants):
    """images -> 192 numbers -> Gemm of 192 x 192 -> logits: large enough for every kernel that OpenVINO has."""
    rng = np.random.default_rng(0)
    values = {
        "middle": rng.normal(size=(192, 192)) / 192**0.5,
        "zero": np.zeros(192),
        "head": rng.normal(size=(192, 4)) / 192**0.5,
        "bias": np.zeros(4),
        "unit": np.array(1 / 255),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["raw"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["raw", "unit"], ["pixels"]),
        helper.make_node("Reshape", ["pixels", "flat"], ["x"]),
    ]
    x, weight = "x", "middle"
    if constants == "int8":
        # U8 activations and symmetric S8 weights, as calibration writes them for x86.
        scale = np.abs(values["middle"]).max(axis=0) / 127
        initial = [
            helper.make_tensor("x.scale", TensorProto.FLOAT, [], [1 / 255]),
            helper.make_tensor("x.zero", TensorProto.UINT8, [], [0]),
            helper.make_tensor("w.scale", TensorProto.FLOAT, [192], scale),
            helper.make_tensor("w.zero", TensorProto.INT8, [192], np.zeros(192, np.int8)),
            helper.make_tensor(
                "w", TensorProto.INT8, [192, 192], np.rint(values.pop("middle") / scale).astype(np.int8)
            ),
        ]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.q"]),
            helper.make_node("DequantizeLinear", ["x.q", "x.scale", "x.zero"], ["x.d"]),
            helper.make_node("DequantizeLinear", ["w", "w.scale", "w.zero"], ["w.d"], axis=1),
        ]
        x, weight = "x.d", "w.d"
    else:
        initial = []
    nodes += [
        helper.make_node("Gemm", [x, weight, "zero"], ["mixed"], name="middle"),
        helper.make_node("Gemm", ["mixed", "head", "bias"], ["logits"], name="head"),
    ]
    initial += [
        helper.make_tensor(k, TensorProto.FLOAT, v.shape, v.astype(np.float32).ravel()) for k, v in values.items()
    ]
    initial.append(helper.make_tensor("flat", TensorProto.INT64, [2], [-1, 192]))
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 8, 8, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])],
        initial,
    )
    return onnx.ModelProto(ir_version=9, graph=graph, opset_import=[helper.make_opsetid("", 18)]).SerializeToString()


@pytest.fixture
def wide(tiny, tmp_path):
    """A bundle with a large Gemm, in fp32 and with that Gemm in 8 bits; "student.int8-trt" is fp32 by mistake."""
    files = {"student.onnx": mixer(tmp_path, "fp32"), "int8.onnx": mixer(tmp_path, "int8")}
    graphs = {"student": "student.onnx", "student.int8-x86": "int8.onnx", "student.int8-trt": "student.onnx"}
    fields = {"outputs": {"logits": [1, 4]}, "selection": {"kind": "none"}, "graphs": graphs}
    return write_bundle(tmp_path / "wide", tiny.make_manifest(**fields), files)


def test_fp32_is_exact_also_where_the_cpu_has_bfloat16(wide, images):
    """Left alone, OpenVINO takes bfloat16 wherever the CPU has it."""
    with load(wide, "openvino", threads=1) as runner, load(wide, "onnxruntime", threads=1) as reference:
        assert runner.describe()["precision"] == "fp32"
        np.testing.assert_allclose(runner.infer(images), reference.infer(images), atol=1e-5)


@needs_bf16
def test_bf16_of_the_fp32_graph(wide, images):
    with load(wide, "openvino", threads=1) as exact, load(wide, "openvino", threads=1, precision="bf16") as runner:
        assert runner.describe()["precision"] == "bf16"
        difference = np.abs(runner.infer(images) - exact.infer(images)).max()
        assert 1e-5 < difference < 0.05


def test_int8_of_a_calibrated_graph(wide, images, monkeypatch):
    monkeypatch.setattr(room, "INT8", "int8-x86")
    with load(wide, "openvino", threads=1) as exact, load(wide, "openvino", threads=1, precision="int8") as runner:
        assert runner.describe()["precision"] == "int8"
        assert runner.path.name == "int8.onnx"
        difference = np.abs(runner.infer(images) - exact.infer(images)).max()
        assert 1e-5 < difference < 0.05


def test_a_graph_that_only_claims_to_be_int8(wide, monkeypatch):
    monkeypatch.setattr(room, "INT8", "int8-trt")
    with pytest.raises(InputError, match="precision of the compiled graph"):
        load(wide, "openvino", threads=1, precision="int8")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_cpu_lacks(bundle, monkeypatch, precision):
    monkeypatch.setattr(room, "precisions", lambda core: ["fp32", "int8"])
    with pytest.raises(InputError, match=f"does not compute in '{precision}'") as caught:
        load(bundle, "openvino", threads=1, precision=precision)
    assert "fp32, int8" in str(caught.value)


@needs_bf16
def test_an_engine_that_takes_another_precision_than_asked_for(bundle, monkeypatch):
    """As OpenVINO does with float16 on a CPU without it: bfloat16, and no word about it."""
    core = room.core()
    made = SimpleNamespace(
        get_property=core.get_property,
        compile_model=lambda path, device, config: core.compile_model(
            path, device, {**config, "INFERENCE_PRECISION_HINT": "f16"}
        ),
    )
    monkeypatch.setattr(room, "core", lambda: made)
    with pytest.raises(InputError, match="precision of the compiled graph") as caught:
        load(bundle, "openvino", threads=1)
    assert "bf16" in str(caught.value)


INTERRUPTED = """
import os, signal, sys, time
from cdl_edge.runtime import load
signal.signal(signal.SIGINT, signal.default_int_handler)
first = load(sys.argv[1], "openvino", threads=1)
second = load(sys.argv[1], "openvino", threads=1)
first.close()
del first
second.close()
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_a_signal_after_the_runners_are_gone(bundle):
    """A Core that is freed while another lives leaves a dangling signal stack: SIGSEGV instead of KeyboardInterrupt."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(bundle.path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_capabilities():
    listed = {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8", "WINOGRAD", "BIN"]}
    assert room.precisions(SimpleNamespace(get_property=lambda device, name: listed[name])) == ["fp32", "int8"]
    assert "fp32" in OFFERED


@pytest.mark.parametrize("name", ["openvino", "ov"])
def test_description(bundle, name):
    with load(bundle, name, threads=1) as runner:
        assert runner.describe() == {
            "backend": "openvino",
            "providers": ["CPU"],
            "threads": 1,
            "version": openvino.__version__.split("-")[0],
            "precision": "fp32",
        }
    with load(bundle, name) as runner:
        assert runner.describe()["threads"] == default_threads()


def test_compiled_once(bundle, images, monkeypatch):
    compiled = []
    real = openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "compile_model", lambda *a, **k: compiled.append(a[3]) or real(*a, **k))
    with load(bundle, "openvino", threads=1) as runner:
        request = runner.engine._request
        for _ in range(3):
            runner.infer(images)
        assert runner.engine._request is request
    assert len(compiled) == 1
    assert compiled[0]["PERFORMANCE_HINT"] == "LATENCY"
    assert compiled[0]["INFERENCE_NUM_THREADS"] == 1
    assert compiled[0]["INFERENCE_PRECISION_HINT"] == "f32"


def narrow(width):
    """Projection, residual, LayerNorm and MLP of one row: the last block of a small ViT, from 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (192, width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    values = {name: rng.normal(size=shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    values |= {f"{name}.bias": rng.normal(size=shape[1]) for name, shape in shapes.items()}
    values |= {"scale": rng.normal(size=width), "shift": rng.normal(size=width)}
    values |= {"unit": np.array(1 / 255), "head": rng.normal(size=(width, 4)), "head.bias": np.zeros(4)}

    def gemm(name, x):
        return helper.make_node("Gemm", [x, name, f"{name}.bias"], [f"{name}.out" if name != "head" else "logits"])

    nodes = [
        helper.make_node("Cast", ["images"], ["raw"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["raw", "unit"], ["pixels"]),
        helper.make_node("Reshape", ["pixels", "flat"], ["x"]),
        gemm("embed", "x"),
        gemm("proj", "embed.out"),
        helper.make_node("Add", ["embed.out", "proj.out"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["norm"], axis=-1),
        gemm("fc1", "norm"),
        helper.make_node("Gelu", ["fc1.out"], ["gelu"]),
        gemm("fc2", "gelu"),
        helper.make_node("Add", ["sum", "fc2.out"], ["y"]),
        gemm("head", "y"),
    ]
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 8, 8, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items()]
        + [numpy_helper.from_array(np.array([-1, 192]), "flat")],
    )
    return onnx.ModelProto(ir_version=9, graph=graph, opset_import=[helper.make_opsetid("", 20)]).SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 64, 96])
def test_one_thread_and_a_narrow_backbone(tiny, tmp_path, width):
    """In a process of its own: OpenVINO's compiler dies of such a graph unless its fused kernels are off."""
    fields = {"outputs": {"logits": [1, 4]}, "selection": {"kind": "none"}, "backbone": {"width": width}}
    bundle = write_bundle(tmp_path / "narrow", tiny.make_manifest(**fields), {"student.onnx": narrow(width)})
    code = (
        "import sys, numpy as np; from cdl_edge.runtime import load\n"
        "with load(sys.argv[1], 'openvino', threads=1) as runner:\n"
        "    print(runner.infer(np.full((1, 8, 8, 3), 90, np.uint8)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with load(bundle, "onnxruntime", threads=1) as reference:
        expected = reference.infer(np.full((1, 8, 8, 3), 90, np.uint8))
    np.testing.assert_allclose(json.loads(done.stdout), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "threads", "cores", "off"), [(64, 1, 4, True), (64, 2, 4, False), (64, 2, 1, True), (96, 1, 4, False)]
)
def test_fused_kernels_are_off_only_where_they_must_be(make_bundle, monkeypatch, width, threads, cores, off):
    monkeypatch.setattr(room, "usable_cores", lambda: cores)
    compiled = []
    real = openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "compile_model", lambda *a, **k: compiled.append(a[3]) or real(*a, **k))
    load(make_bundle(backbone={"width": width}), "openvino", threads=threads).close()
    assert ("SNIPPETS_MODE" in compiled[0]) == off


def test_an_operator_that_openvino_does_not_know(bundle):
    proto = onnx.load(str(bundle.graph()), load_external_data=False)
    proto.graph.node[0].op_type = "Nonsense"
    files = {name: bundle.path / name for name in bundle.manifest.document["files"]}
    odd = write_bundle(
        bundle.path.parent / "odd", bundle.manifest.document, {**files, "student.onnx": proto.SerializeToString()}
    )
    with pytest.raises(InputError, match="cannot compile the graph") as caught:
        load(odd, "openvino", threads=1)
    got = next(line for line in str(caught.value).splitlines() if line.strip().startswith("got:"))
    assert "Exception from" not in got


def test_openvino_is_missing(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"pip install 'cdl-edge\[openvino\]'"):
        load(bundle, "openvino")
