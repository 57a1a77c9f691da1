"""The product's own build code with a real NVIDIA parser and builder: tensorrt_rtx, on the CPU.

Proves: the graphs parse and compile, types are kept, learnt constants can be marked for refit, failures are told in
words. It is strong evidence, not proof, for TensorRT itself: tensorrt_rtx is another product with nearly the same API
(1.7 against 10.3 to 11.4), it cannot load, run, time or refit an engine without a GPU, and has no timing cache.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cdl_edge.errors import InputError
from cdl_edge.export.profiles import PROFILES
from cdl_edge.machine import cuda_driver
from cdl_edge.runtime.engines import achieved
from cdl_edge.runtime.engines import build as module
from cdl_edge.runtime.engines.build import Options, build, define
from cdl_edge.runtime.engines.product import logger
from cdl_edge.runtime.engines.refit import learnt_records

trt = pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no real TensorRT parser and builder to test with"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NO_REFIT = Options(refit=False)
"tensorrt_rtx compiles a refittable engine on a GPU only"
LEARNERS = ("l2p", "dualprompt", "coda", "apt")
DIALECTS = [(name, precision) for name in ("trt10", "trt11") for precision in (*PROFILES[name].precisions, "int8")]


def write(lab, folder: Path, student, profile: str, precision: str, batch: int | None = 1, part: str = "student"):
    """A graph of a tiny student and its files of constants; int8: as `calibrate` makes it of the fp32 graph."""
    options = {"profile": PROFILES[profile], "precision": "fp32" if precision == "int8" else precision}
    artefact, _ = lab.artefact(student, batch=batch, part=part, **options)
    path = folder / "student.onnx"
    for name, content in {path.name: artefact.models["student"], **artefact.constants}.items():
        (folder / name).write_bytes(content)
    if precision == "int8":
        from cdl_edge.calibrate.collect import collect
        from cdl_edge.calibrate.float_graph import FloatGraph
        from cdl_edge.calibrate.quantize import quantise
        from cdl_edge.calibrate.schemes import get_scheme

        other, _ = lab.artefact(student, profile=PROFILES[profile])  # the whole student has the ranges of both passes
        (folder / "whole").mkdir(exist_ok=True)
        for name, content in {path.name: other.models["student"], **other.constants}.items():
            (folder / "whole" / name).write_bytes(content)
        whole = FloatGraph(folder / "whole" / path.name, other.layers.graphs["student"])
        ranges = collect(whole, lab.pixels(6)).tensors
        graph = FloatGraph(path, artefact.layers.graphs["student"])
        quantised = quantise({"student": graph}, ranges, get_scheme("int8-trt"))
        for name, content in {path.name: quantised.models["student"], **quantised.constants}.items():
            (folder / name).write_bytes(content)
    return path


@pytest.mark.parametrize(("one_pass", "batch"), [(False, 1), (True, None)], ids=["two-pass-batch-1", "one-pass-free"])
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize(("profile", "precision"), DIALECTS)
def test_every_student_is_understood(lab, tmp_path, learner, one_pass, profile, precision, batch):
    """Parsed and typed, every learnt constant marked for refit, an optimisation profile where the batch is free."""
    student = lab.student(learner, (12, 6), one_pass)
    path = write(lab, tmp_path, student, profile, precision, batch)
    learnt = [record.name for record in learnt_records(path)]
    known = define(trt, path, Options(), learnt)
    assert len(learnt) > 10 and known.refittable == tuple(learnt)
    assert all(known.network.are_weights_marked_refittable(name) for name in learnt)
    assert known.config.get_flag(trt.BuilderFlag.REFIT_INDIVIDUAL) and not known.config.get_flag(trt.BuilderFlag.TF32)
    assert known.config.num_optimization_profiles == (1 if batch is None else 0)
    kinds = {known.network.get_layer(i).get_output(0).dtype for i in range(known.network.num_layers)}
    assert (trt.DataType.HALF in kinds) == (precision == "fp16")
    assert (trt.DataType.BF16 in kinds) == (precision == "bf16")
    assert (trt.DataType.INT8 in kinds) == (precision == "int8")
    names = [known.network.get_output(i).name for i in range(known.network.num_outputs)]
    assert names == (["logits"] if learner == "apt" else ["logits", "prompt_weights"])


@pytest.mark.parametrize("part", ["query", "prompted"])
@pytest.mark.parametrize(("profile", "precision"), DIALECTS)
def test_the_passes_apart_are_understood(lab, tmp_path, profile, precision, part):
    path = write(lab, tmp_path, lab.student("coda"), profile, precision, part=part)
    known = define(trt, path, Options())
    assert known.network.num_inputs == (2 if part == "prompted" else 1)


@pytest.mark.parametrize(
    ("learner", "profile", "precision"),
    [
        *((learner, *dialect) for dialect in DIALECTS if dialect[0] == "trt10" for learner in LEARNERS),
        *(pytest.param("coda", *dialect, marks=pytest.mark.slow) for dialect in DIALECTS if dialect[0] != "trt10"),
    ],
)
def test_every_learner_compiles(lab, tmp_path, learner, profile, precision):
    way = "patches" if learner in ("dualprompt", "coda") else "class"
    path = write(lab, tmp_path, lab.student(learner, (12, 6), one_pass=True, query_of=way), profile, precision)
    plan = build(trt, path, NO_REFIT)
    assert len(plan.data) > 100_000 and plan.refittable == ()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["student", "query", "prompted"])
@pytest.mark.parametrize("batch", [1, None], ids=["batch-1", "free-batch"])
@pytest.mark.parametrize(("profile", "precision"), DIALECTS)
@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda"])
def test_two_passes_compile(lab, tmp_path, learner, profile, precision, batch, part):
    path = write(lab, tmp_path, lab.student(learner), profile, precision, batch, part)
    assert len(build(trt, path, NO_REFIT).data) > 100_000


def test_half_precision_uses_fused_attention_and_unfusing_ends_it(lab, tmp_path):
    """The kernel's name stands in the plan. What `unfuse_attention` does on another version is for the gate to tell."""
    path = write(lab, tmp_path, lab.student("apt"), "trt10", "fp16")
    assert b"_gemm_mha_v2" in build(trt, path, NO_REFIT).data
    apart = build(trt, path, Options(refit=False, unfuse_attention=True))
    assert b"_gemm_mha_v2" not in apart.data
    known = define(trt, path, Options(unfuse_attention=True))
    names = [known.network.get_output(i).name for i in range(known.network.num_outputs)]
    assert names == ["logits", *[f"{module.SCORES}{i}" for i in range(6)]]


def test_the_operator_attention_cannot_be_unfused(lab, tmp_path):
    path = write(lab, tmp_path, lab.student("apt"), "trt11", "fp32")
    with pytest.raises(InputError, match="cannot be unfused") as caught:
        define(trt, path, Options(unfuse_attention=True))
    assert "--profile trt10" in str(caught.value)


def test_the_profile_for_onnxruntime_is_refused_with_the_remedy(lab, tmp_path):
    """Bytes are moved before they are cast there."""
    path = write(lab, tmp_path, lab.student("apt"), "ort", "fp32")
    with pytest.raises(InputError, match="cannot read the graph") as caught:
        build(trt, path, NO_REFIT)
    assert "(Reshape)" in str(caught.value) and "UInt8" in str(caught.value) and "--profile trt10" in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_layers_that_the_builder_reports_are_read(lab, tmp_path, monkeypatch, precision):
    """Real layers of a real plan, from the builder's log, put into the form of an inspector's JSON."""
    lines: list[str] = []
    monkeypatch.setattr(type(logger(trt)), "log", lambda self, severity, message: lines.append(message))
    build(trt, write(lab, tmp_path, lab.student("apt"), "trt10", precision), NO_REFIT)
    text = next(line for line in lines if line.startswith("Layers:"))
    layers = []
    for line in text.splitlines()[1:]:
        if found := re.match(r"Name: (?P<Name>\S*), LayerType: (?P<LayerType>\w+), ", line):
            types = [{"Datatype": kind} for kind in re.findall(r"Datatype: (\w+)", line)]
            tactic = re.search(r"TacticName: ([^,]*)", line)[1]
            metadata = line.partition("Metadata: ")[2]
            layers.append({**found.groupdict(), "Outputs": types, "TacticName": tactic, "Metadata": metadata})
    result = achieved.read(json.dumps({"Layers": layers}))
    achieved.check(precision, result)
    assert result["attention"] == (["_gemm_mha_v2"] if precision == "fp16" else [])
    six_in_six_blocks = {"fp32": {"fp32": 36}, "fp16": {"fp16": 36}, "int8": {"int8": 32, "fp32": 4}}
    assert result["linears"] == six_in_six_blocks[precision], "by the names of their nodes"
    for other in {"fp32", "fp16", "int8"} - {precision}:
        with pytest.raises(InputError, match="does not compute in"):
            achieved.check(other, result)


# -- small graphs -----------------------------------------------------------------------------------------------------


def save(path: Path, nodes, inputs, output, constants=(), opset=19) -> Path:
    """A graph from `x` to `y`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(value, name) for name, value in dict(constants).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def quantised(path: Path, zero: int) -> Path:
    """A linear layer in explicit INT8: symmetric when zero is 0."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-127, 128, (64, 64), dtype=np.int8),
        "s": np.array(0.02, np.float32),
        "z": np.array(zero, np.int8),
        "z0": np.array(0, np.int8),
        "b": rng.normal(size=64).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z0"], ["wd"]),
        helper.make_node("Gemm", ["d", "wd", "b"], ["y"], name="prompted.blocks.0.fc1"),
    ]
    return save(path, nodes, [16, 64], [16, 64], constants)


def test_explicit_int8_compiles(tmp_path):
    known = define(trt, quantised(tmp_path / "q.onnx", 0), NO_REFIT)
    kinds = {known.network.get_layer(i).type for i in range(known.network.num_layers)}
    assert {trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE} <= kinds
    assert len(build(trt, tmp_path / "q.onnx", NO_REFIT).data) > 1000


def test_an_asymmetric_zero_point_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the graph") as caught:
        build(trt, quantised(tmp_path / "q.onnx", 3), NO_REFIT)
    assert "Non-zero zero point is not supported" in str(caught.value) and "int8-trt" in str(caught.value)


def test_an_unknown_operator(tmp_path):
    path = save(tmp_path / "u.onnx", [helper.make_node("Nonsense", ["x"], ["y"], name="n", domain="")], [1, 4], [1, 4])
    with pytest.raises(InputError, match="cannot read the graph") as caught:
        build(trt, path, NO_REFIT)
    assert "node n (Nonsense)" in str(caught.value)


def test_every_error_of_the_parser_is_told(tmp_path):
    nodes = [helper.make_node(f"Nonsense{i}", ["x"], ["y" if i == 0 else f"y{i}"], name=f"n{i}") for i in range(3)]
    with pytest.raises(InputError) as caught:
        build(trt, save(tmp_path / "u.onnx", nodes, [1, 4], [1, 4]), NO_REFIT)
    assert all(f"Nonsense{i}" in str(caught.value) for i in range(3))


def test_free_axes_besides_the_batch(tmp_path):
    path = save(tmp_path / "d.onnx", [helper.make_node("Relu", ["x"], ["y"])], ["n", "m"], ["n", "m"])
    with pytest.raises(InputError, match="free axes besides the batch") as caught:
        build(trt, path, NO_REFIT)
    assert "(-1, -1)" in str(caught.value)


def test_a_free_batch_without_a_profile_is_what_tensorrt_refuses(tmp_path, monkeypatch):
    """Why `_batches` is there; and the builder's own words reach the message."""
    path = save(tmp_path / "d.onnx", [helper.make_node("Relu", ["x"], ["y"])], ["n", 4], ["n", 4])
    assert len(build(trt, path, NO_REFIT).data) > 100
    monkeypatch.setattr(module, "_batches", lambda *arguments: None)
    with pytest.raises(InputError, match=r"(?i)profile"):
        build(trt, path, NO_REFIT)


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_a_truncated_graph(lab, tmp_path, part):
    path = write(lab, tmp_path, lab.student("apt"), "trt10", "fp32")
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(InputError):
        build(trt, path, NO_REFIT)


def test_no_graph(tmp_path):
    with pytest.raises(InputError, match="missing"):
        build(trt, tmp_path / "student.onnx", NO_REFIT)


@pytest.mark.parametrize("name", ["backbone.bin", "prompts.bin"])
def test_missing_external_data(lab, tmp_path, name):
    path = write(lab, tmp_path, lab.student("apt"), "trt10", "fp32")
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing"):
        build(trt, path, NO_REFIT)


def test_truncated_external_data(lab, tmp_path):
    path = write(lab, tmp_path, lab.student("apt"), "trt10", "fp32")
    content = (tmp_path / "backbone.bin").read_bytes()
    (tmp_path / "backbone.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError):
        build(trt, path, NO_REFIT)


def test_names_that_the_network_lacks_are_left_out(tmp_path):
    weight = np.ones((4, 4), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [1, 4], [1, 4], {"w": weight, "unused": weight})
    assert define(trt, path, Options(), ["w", "unused", "absent"]).refittable == ("w",)
    known = define(trt, path, Options(), ["absent"])
    assert known.refittable == () and not known.config.get_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)


def test_options_reach_the_builder(tmp_path):
    path = save(tmp_path / "r.onnx", [helper.make_node("Relu", ["x"], ["y"])], ["n", 4], ["n", 4])
    known = define(trt, path, Options(workspace_mib=64, level=1, max_batch=3))
    assert known.config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert known.config.builder_optimization_level == 1
    assert known.config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


@pytest.mark.parametrize(
    ("line", "meaning", "remedy"),
    [
        (
            "Could not find any implementation for node {ForeignNode[a...b]}.",
            "found no kernel",
            "raise --workspace-mib",
        ),
        ("Requested amount of GPU memory (9 bytes) could not be allocated. OutOfMemory", "ran out of memory", "swap"),
        ("[virtualMemoryBuffer.cpp::resizePhysical] Error Code 2: OutOfMemory", "ran out of memory", "lower"),
        ("MyelinCheckException: decompose_composite_ops.cpp:59", "cannot compile", "--profile trt10"),
        ("SM version 12.1 is not supported by this build", "does not know this GPU", "JetPack or driver"),
        ("Error Code 1: Cuda Runtime (invalid argument)", "GPU or its driver failed", "nvidia-smi"),
        ("something new", "could not build", "cdl-edge doctor"),
    ],
)
def test_what_the_builder_says_becomes_what_to_do(tmp_path, line, meaning, remedy):
    error = module._failure(tmp_path / "g.onnx", ["a warning", line], Options(workspace_mib=99))
    assert meaning in str(error) and remedy in str(error) and line[:40] in str(error)
    if "workspace-mib" in remedy:
        assert "now 99" in str(error)


@pytest.mark.skipif(cuda_driver().devices > 0, reason="there is a GPU: nothing to refuse")
def test_a_builder_s_failure_becomes_an_input_error(lab, tmp_path):
    """A real refusal: tensorrt_rtx wants a GPU for a refittable engine."""
    path = write(lab, tmp_path, lab.student("apt"), "trt10", "fp32")
    with pytest.raises(InputError, match="the GPU or its driver failed while building") as caught:
        build(trt, path, Options(), ["head.weight"])
    assert "CUDA_SUCCESS" in str(caught.value)


def test_onnx_checks_the_small_graphs(tmp_path):
    onnx.checker.check_model(str(quantised(tmp_path / "q.onnx", 0)), full_check=True)
