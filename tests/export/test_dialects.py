"""Every dialect, precision, pass and rewrite computes what the student computes."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import onnx
import pytest

from cdl_edge.errors import InputError
from cdl_edge.export.assembly import assemble
from cdl_edge.export.parity import LOW_PRECISION
from cdl_edge.export.profiles import PROFILES, get_profile
from cdl_edge.export.rewrites import ALL, LAST_TOKENS, Rewrites
from cdl_edge.export.student_graph import StudentGraph

LEARNERS = ("l2p", "dualprompt", "coda", "apt")
SWITCHES = [f.name for f in fields(Rewrites)]


@pytest.fixture(scope="module")
def many_tokens(lab):
    """A backbone with so many tokens that the last block is rewritten too."""
    backbone = lab.backbone("plain", depth=6, patch=4)
    assert backbone.pos_embed.shape[1] == 65 >= LAST_TOKENS
    return backbone


def close(got, expected, tolerance=1e-4):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert np.abs(got[name] - value).max() <= tolerance, name


@pytest.mark.quick("l2p-trt10", "dualprompt-trt11", "coda-ort", "coda-trt10", "apt-openvino")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("learner", LEARNERS)
def test_profiles(lab, many_tokens, learner, profile):
    student, pixels = lab.student(learner, backbone=many_tokens), lab.pixels(3)
    graph = lab.export(student, profile=PROFILES[profile])
    close(graph.each(pixels), lab.truth(student, pixels))
    assert graph.proto.opset_import[0].version == PROFILES[profile].opset
    kinds = {node.op_type for node in graph.proto.graph.node}
    assert ("Attention" in kinds) == ("fp32" in PROFILES[profile].attention)
    assert ("Gelu" in kinds) == PROFILES[profile].gelu
    assert "LayerNormalization" in kinds


@pytest.mark.parametrize("profile", ["trt10", "trt11", "openvino"])
def test_bytes_go_to_a_cast_only(lab, profile):
    """TensorRT takes a byte input to nothing else."""
    graph = lab.export(lab.student("apt"), profile=PROFILES[profile])
    readers = [node.op_type for node in graph.proto.graph.node if "images" in node.input]
    assert set(readers) == {"Cast"}


@pytest.mark.quick("l2p-trt10", "dualprompt-ort", "coda-trt11")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda"])
def test_the_passes_apart(lab, many_tokens, learner, profile):
    student, pixels = lab.student(learner, backbone=many_tokens), lab.pixels(3)
    expected = lab.truth(student, pixels)
    query = lab.export(student, profile=PROFILES[profile], part="query")
    prompted = lab.export(student, profile=PROFILES[profile], part="prompted")
    weights = query.each(pixels)
    close(weights, {"prompt_weights": expected["prompt_weights"]})
    logits = [
        prompted.session.run(["logits"], {"images": pixels[i : i + 1], "prompt_weights": w[None]})[0]
        for i, w in enumerate(weights["prompt_weights"])
    ]
    close({"logits": np.concatenate(logits)}, {"logits": expected["logits"]})
    other = prompted.session.run(
        ["logits"], {"images": pixels[:1], "prompt_weights": weights["prompt_weights"][:1, :, ::-1].copy()}
    )[0]
    assert np.abs(other - expected["logits"][:1]).max() > 1e-3, "the weights must matter"


@pytest.mark.parametrize("learner", ["apt", "coda"])
def test_one_pass_has_no_parts(lab, learner):
    student = lab.student(learner, one_pass=True)
    with pytest.raises(InputError, match="no query graph"):
        StudentGraph(student, lab.preprocessing, 7, 1).build("query")


@pytest.mark.quick("l2p-trt10", "coda-openvino")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda"])
def test_the_patches_as_the_query_in_every_dialect(lab, learner, profile):
    student, pixels = lab.student(learner, one_pass=True, query_of="patches"), lab.pixels(4)
    graph, expected = lab.export(student, profile=PROFILES[profile]), lab.truth(student, pixels)
    got = graph.each(pixels)
    assert all(np.abs(got[name] - value).max() <= 1e-4 for name, value in expected.items())


@pytest.mark.quick("l2p-ort-one", "dualprompt-trt10-dynamic", "coda-trt11-one", "apt-trt10-one")
@pytest.mark.parametrize("dynamic", [False, True], ids=["one", "dynamic"])
@pytest.mark.parametrize("profile", ["ort", "trt10", "trt11"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_half_precision(lab, many_tokens, learner, profile, dynamic):
    student, pixels = lab.student(learner, backbone=many_tokens), lab.pixels(4)
    expected = lab.truth(student, pixels)["logits"]
    graph = lab.export(student, profile=PROFILES[profile], precision="fp16", batch=None if dynamic else 1)
    got = (graph.run(pixels) if dynamic else graph.each(pixels))["logits"]
    error = np.abs(got - expected)
    assert error.max() > 1e-6 and error.mean() <= LOW_PRECISION["fp16"][0] * np.ptp(expected)
    typed = onnx.shape_inference.infer_shapes(graph.proto)
    types = {v.name: v.type.tensor_type.elem_type for v in typed.graph.value_info}
    for node in graph.proto.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert types.get(node.input[0], 1) == onnx.TensorProto.FLOAT, node.name
        if node.op_type == "Attention":
            assert {a.name: a.i for a in node.attribute}["softmax_precision"] == onnx.TensorProto.FLOAT


def test_the_precisions_share_their_constants(lab, many_tokens):
    student = lab.student("coda", backbone=many_tokens)
    graphs = {
        name: StudentGraph(student, lab.preprocessing, 7, 1, PROFILES["trt11"], precision).build(part)
        for name, part, precision in (
            ("student", "student", "fp32"), ("query", "query", "fp32"), ("student.fp16", "student", "fp16"),
        )
    }  # fmt: skip
    together = assemble(graphs, {})
    alone = assemble({"student": graphs["student"]}, {})
    assert len(together.constants["backbone.bin"]) < 1.1 * len(alone.constants["backbone.bin"])
    assert together.constants["prompts.bin"] == alone.constants["prompts.bin"]
    graphs["query"].constants["norm.weight"] = graphs["query"].constants["norm.weight"] + 1
    with pytest.raises(ValueError, match=r"norm\.weight"):
        assemble(graphs, {})


@pytest.mark.parametrize("learner", ["apt", "coda"])
def test_the_frozen_file_does_not_depend_on_what_learns(lab, many_tokens, learner):
    with_kd, without = (
        lab.artefact(lab.student(learner, kd, backbone=many_tokens))[0].constants["backbone.bin"]
        for kd in ((12, 6), None)
    )
    assert with_kd == without


@pytest.mark.quick(
    "l2p-last_rows",
    "dualprompt-last_products",
    "l2p-tables",
    "apt-input",
    "apt-scale",
    "dualprompt-heads",
    "l2p-learnt",
)
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_rewrite_is_exact(lab, learner, switch):
    """Both with the rewrite and without it the graph equals the student, and it is another graph."""
    backbone = lab.backbone("plain", depth=6, patch=4, layer_scale=True)
    student, pixels = lab.student(learner, backbone=backbone), lab.pixels(3)
    expected = lab.truth(student, pixels)
    off = replace(ALL, **{switch: False})
    close(lab.export(student, rewrites=off).each(pixels), expected)
    nothing_to_do = {
        "coda_products": ("l2p", "dualprompt", "apt"),
        "shared_stem": ("apt",),
        "learnt": ("apt",),
    }  # fmt: skip
    changed = lab.digests(student, rewrites=off) != lab.digests(student)
    assert changed == (learner not in nothing_to_do.get(switch, ()))


@pytest.mark.quick("apt-one-pass")
@pytest.mark.parametrize("one_pass", [False, True], ids=["two-pass", "one-pass"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_no_rewrite_at_all(lab, learner, one_pass):
    student, pixels = lab.student(learner, one_pass=one_pass), lab.pixels(3)
    none = Rewrites(**dict.fromkeys(SWITCHES, False))
    close(lab.export(student, rewrites=none).each(pixels), lab.truth(student, pixels))


@pytest.mark.quick("apt-linear-ort")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("learner", "kd_head"), [("coda", "normalised"), ("apt", "linear")])
def test_heads_of_two_kinds(lab, many_tokens, learner, kd_head, profile):
    student, pixels = lab.student(learner, kd_head=kd_head, backbone=many_tokens), lab.pixels(3)
    expected = lab.truth(student, pixels)
    for rewrites in (ALL, replace(ALL, heads=False)):
        close(lab.export(student, profile=PROFILES[profile], rewrites=rewrites).each(pixels), expected)


def test_an_unknown_profile():
    with pytest.raises(InputError, match="did you mean 'trt10'"):
        get_profile("trt-10")
