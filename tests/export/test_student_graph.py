"""The hand-written graph computes what the student computes, for everything that a run can end in."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from cdl_edge.errors import InputError

TOLERANCE = 1e-4
LEARNERS = ("l2p", "dualprompt", "coda", "apt")
POOLS = ("l2p", "dualprompt", "coda")
KD = (12, 6)


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Same outputs, same shapes, no difference above the gate's tolerance."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == np.float32
        assert got[name].shape == value.shape, name
        difference = np.abs(got[name] - value)
        assert difference.max() <= TOLERANCE, f"{name}: max {difference.max():.2e}, mean {difference.mean():.2e}"


@pytest.mark.quick("l2p-kdp-two-pass", "dualprompt-kdp-one-pass", "coda-no-kd-two-pass", "apt-kdp-two-pass")
@pytest.mark.parametrize("one_pass", [False, True], ids=["two-pass", "one-pass"])
@pytest.mark.parametrize("kd", [None, KD], ids=["no-kd", "kdp"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner(lab, learner, kd, one_pass):
    student = lab.student(learner, kd, one_pass)
    graph, pixels = lab.export(student), lab.pixels()
    expected = lab.truth(student, pixels)
    assert expected["logits"].std() > 0.05, "nothing would be proven"
    assert np.ptp(expected["logits"], axis=0).max() > 0.05, "the logits must depend on the image"
    assert_equal(graph.each(pixels), expected)
    assert ("prompt_weights" in graph.outputs) == (learner != "apt")


@pytest.mark.quick("l2p-kdp-1")
@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize("kd", [None, KD], ids=["no-kd", "kdp"])
@pytest.mark.parametrize("learner", POOLS)
def test_the_patches_as_the_query(lab, learner, kd, batch):
    student = lab.student(learner, kd, True, query_of="patches")
    pixels = lab.pixels()
    expected = lab.truth(student, pixels)
    by_class = lab.truth(lab.student(learner, kd, True), pixels)
    assert np.abs(expected["prompt_weights"] - by_class["prompt_weights"]).max() > 0.01
    assert_equal(lab.export(student, batch=batch).each(pixels), expected)


@pytest.mark.quick("coda")
@pytest.mark.parametrize("learner", LEARNERS)
def test_as_the_authors_have_it(lab, learner):
    """Heads with a bias behind a fixed LayerNorm, and entries that are not learnt yet may be selected."""
    student = lab.student(learner, KD, compat=True)
    graph, pixels = lab.export(student), lab.pixels(4)
    assert_equal(graph.each(pixels), lab.truth(student, pixels))
    if learner in ("l2p", "dualprompt"):
        assert graph.outputs["prompt_weights"][-1] == (30 if learner == "l2p" else student.learner.spec.tasks)


@pytest.mark.parametrize("learner", LEARNERS)
def test_depth_twelve(lab, learner):
    student = lab.student(learner, KD, depth=12)
    assert_equal(lab.export(student).each(lab.pixels(2)), lab.truth(student, lab.pixels(2)))


@pytest.mark.quick("coda-stem", "apt-padded stem")
@pytest.mark.parametrize("stem", ["stem", "padded stem"])
@pytest.mark.parametrize("learner", ["coda", "apt"])
def test_convolutional_stem(lab, learner, stem):
    student = lab.student(learner, stem=stem)
    assert_equal(lab.export(student).each(lab.pixels()), lab.truth(student, lab.pixels()))


@pytest.mark.parametrize("stem", ["plain", "stem", "padded stem"])
def test_raw_pixels_as_the_authors_feed_them(lab, stem):
    raw = replace(lab.preprocessing, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    student, pixels = lab.student("dualprompt", stem=stem), lab.pixels()
    assert_equal(lab.export(student, preprocessing=raw).each(pixels), lab.truth(student, pixels, raw))


@pytest.mark.quick("coda-layer-scale", "apt-no-qkv-bias")
@pytest.mark.parametrize("options", [{"layer_scale": True}, {"qkv_bias": False}], ids=["layer-scale", "no-qkv-bias"])
@pytest.mark.parametrize("learner", ["coda", "apt"])
def test_other_backbones(lab, learner, options):
    student = lab.student(learner, **options)
    assert_equal(lab.export(student).each(lab.pixels()), lab.truth(student, lab.pixels()))


@pytest.mark.parametrize("kd", [(1, 6), (3, 2), (12, 0)], ids=["token-only", "three-blocks", "no-rows"])
def test_other_kd_prompts(lab, kd):
    for learner in ("dualprompt", "apt"):
        student = lab.student(learner, kd)
        assert_equal(lab.export(student).each(lab.pixels(3)), lab.truth(student, lab.pixels(3)))


MIXED = [("coda", "normalised"), ("dualprompt", "normalised"), ("apt", "linear")]


@pytest.mark.quick("apt-linear-dynamic")
@pytest.mark.parametrize("batch", [1, None], ids=["one", "dynamic"])
@pytest.mark.parametrize(("learner", "kd_head"), MIXED)
def test_a_kd_head_of_another_kind_than_the_own_one(lab, learner, kd_head, batch):
    student, pixels = lab.student(learner, kd_head=kd_head), lab.pixels()
    assert type(student.head) is not type(student.kd_head)
    graph = lab.export(student, batch=batch)
    got = graph.run(pixels) if batch is None else graph.each(pixels)
    assert_equal(got, lab.truth(student, pixels))
    cut = lab.export(student, classes=4, batch=batch)
    logits = (cut.run(pixels) if batch is None else cut.each(pixels))["logits"]
    np.testing.assert_allclose(logits, got["logits"][:, :4], atol=TOLERANCE)


@pytest.mark.quick("l2p-1")
@pytest.mark.parametrize("learnt", [1, 4])
@pytest.mark.parametrize("learner", LEARNERS)
def test_other_numbers_of_tasks(lab, learner, learnt):
    student = lab.student(learner, learnt=learnt)
    graph = lab.export(student)
    assert_equal(graph.each(lab.pixels(3)), lab.truth(student, lab.pixels(3)))
    if learner == "dualprompt":
        assert graph.outputs["prompt_weights"] == [3, learnt]
    if learner == "coda":
        assert graph.outputs["prompt_weights"] == [5, 25 * learnt]


def test_pool_of_which_nothing_was_selected_yet(lab):
    student = lab.student("l2p")
    student.learner.used[:] = False
    assert lab.export(student).outputs["prompt_weights"] == [1, 30]


@pytest.mark.slow
def test_coda_with_a_component_that_is_zero(lab):
    """F.cosine_similarity clamps the length: 0, not NaN."""
    student = lab.student("coda")
    with torch.no_grad():
        student.learner.attention["0"][3] = 0
        student.learner.key["1"][4] = 0
    assert_equal(lab.export(student).each(lab.pixels(2)), lab.truth(student, lab.pixels(2)))


@pytest.mark.quick("l2p-dynamic-two-pass", "dualprompt-static-one-pass", "coda-dynamic-one-pass", "apt-static-two-pass")
@pytest.mark.parametrize("one_pass", [False, True], ids=["two-pass", "one-pass"])
@pytest.mark.parametrize("batch", [None, 3], ids=["dynamic", "static"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_batches(lab, learner, batch, one_pass):
    student, pixels = lab.student(learner, one_pass=one_pass), lab.pixels(3)
    graph = lab.export(student, batch=batch)
    dimension = graph.proto.graph.input[0].type.tensor_type.shape.dim[0]
    assert (dimension.dim_param, dimension.dim_value) == (("batch", 0) if batch is None else ("", 3))
    assert_equal(graph.run(pixels), lab.truth(student, pixels))
    if batch is None:
        assert_equal(graph.each(pixels), lab.truth(student, pixels))


@pytest.mark.parametrize("learner", POOLS)
def test_an_answer_does_not_depend_on_its_batch_mates(lab, learner):
    graph = lab.export(lab.student(learner), batch=None)
    pixels = lab.pixels(6)
    alone, together = graph.each(pixels), graph.run(pixels)
    shuffled = graph.run(np.ascontiguousarray(pixels[::-1]))
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, atol=2e-5)
        np.testing.assert_allclose(shuffled[name][::-1], value, atol=2e-5)


@pytest.mark.parametrize("learner", ["coda", "apt"])
def test_heads_are_cut_to_the_classes_seen(lab, learner):
    student, pixels = lab.student(learner), lab.pixels(3)
    got, expected = lab.export(student, classes=4).each(pixels), lab.truth(student, pixels)
    assert got["logits"].shape == (3, 4)
    np.testing.assert_allclose(got["logits"], expected["logits"][:, :4], atol=TOLERANCE)


@pytest.mark.parametrize("learner", POOLS)
def test_what_is_not_learnt_yet_is_not_in_the_files(lab, learner):
    def exported(noise: float):
        student = lab.student(learner, learnt=2)
        with torch.no_grad():
            for name, value in student.learner.named_parameters():
                if learner == "l2p":
                    value[~student.learner.used] += noise
                elif not name.startswith("general"):
                    value[2 * value.shape[0] // 4 :] += noise  # two of four tasks
            for head in (student.head, student.kd_head):
                head.weight[5:] += noise
                head.bias[5:] += noise
        return lab.digests(student, classes=5)

    assert exported(0.0) == exported(9.0)


def kinds(proto: onnx.ModelProto) -> Counter:
    return Counter(node.op_type for node in proto.graph.node)


@pytest.mark.slow
def test_the_expensive_operators_are_there_once(lab):
    """Two passes share what is in front of block 0's attention; the graph uses fused operators only."""
    depth = 6
    two, one, apt = (
        kinds(lab.export(s).proto)
        for s in (lab.student("coda"), lab.student("coda", one_pass=True), lab.student("apt", None))
    )
    assert (two["Attention"], one["Attention"], apt["Attention"]) == (2 * depth, depth, depth)
    assert (two["Gelu"], one["Gelu"], apt["Gelu"]) == (2 * depth, depth, depth)
    # norm1 of block 0 once for both passes, one final norm a pass; APT's head has its own.
    assert two["LayerNormalization"] == 4 * depth - 1 + 2
    assert one["LayerNormalization"] == 2 * depth + 1
    assert apt["LayerNormalization"] == 2 * depth + 2
    for found in (two, one, apt):
        assert found["Softmax"] == found["Erf"] == found["Einsum"] == 0


def test_the_last_block_computes_only_rows_that_are_read(lab):
    graph = lab.export(lab.student("coda", KD)).proto
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(graph, data_prop=True).graph.value_info
    }
    rows = [shapes[node.output[0]][0] for node in graph.graph.node if node.op_type == "Gelu"]
    tokens = 1 + 16
    assert rows == [tokens] * 5 + [1] + [tokens + 1] * 5 + [2]


def test_a_stem_that_is_no_convolution_is_refused(lab):
    backbone = lab.backbone("stem")
    backbone.patch_embed.backbone.append(torch.nn.MaxPool2d(1))
    with pytest.raises(InputError, match="stem"):
        lab.artefact(lab.student("apt", backbone=backbone))
