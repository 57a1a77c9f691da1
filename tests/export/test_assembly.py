"""student.onnx holds the graph, backbone.bin what is frozen, prompts.bin what learning changes."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

from cdl_edge.packing import ALIGNMENT, pack

LEARNERS = ("l2p", "dualprompt", "coda", "apt")


def places(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_pack_is_aligned_and_reads_back():
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("b", (3, 5)), ("a", (1,)), ("c", (7, 2, 2)))}
    content, where = pack(arrays)
    for name, array in arrays.items():
        offset, length = where[name]
        assert offset % ALIGNMENT == 0
        read = np.frombuffer(content, np.float32, length // 4, offset).reshape(array.shape)
        np.testing.assert_array_equal(read, array)
    assert pack(dict(reversed(arrays.items()))) == (content, where)


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_learnt_values_are_never_inside_the_graph(lab, learner):
    student = lab.student(learner)
    graph = lab.export(student)
    sizes = {name: len(content) for name, content in graph.artefact.constants.items()}
    assert set(sizes) == {"backbone.bin", "prompts.bin"}
    for tensor in graph.proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = places(tensor)
            assert int(place["offset"]) % 64 == 0
            assert int(place["offset"]) + int(place["length"]) <= sizes[place["location"]]
            assert int(place["length"]) == 4 * int(np.prod(tensor.dims))
        else:
            assert tensor.ByteSize() < 1000, tensor.name
            # Shapes and axes; the one float is APT's mask of the class row, ones and zeros.
            assert tensor.data_type == onnx.TensorProto.INT64 or tensor.name.startswith("cls_mask."), tensor.name
    # Other learnt values, the same structure: the graph does not change by one byte.
    other = lab.student(learner, seed=2)
    if learner == "l2p":
        other.learner.used.copy_(student.learner.used)
    one, two = lab.digests(student), lab.digests(other)
    assert one["student.onnx"] == two["student.onnx"]
    assert one["backbone.bin"] == two["backbone.bin"]
    assert one["prompts.bin"] != two["prompts.bin"]


@pytest.mark.slow
def test_backbone_bin_depends_on_the_backbone_only(lab):
    backbone = lab.backbone()
    cases = (
        ("coda", (12, 6), False, 3, 1, 7),
        ("coda", (12, 6), False, 2, 5, 4),
        ("coda", None, True, 3, 1, 7),
        ("l2p", (12, 6), True, 3, 1, 7),
        ("dualprompt", (1, 6), False, 1, 1, 2),
        ("apt", None, False, 3, 1, 7),
    )
    files = []
    for learner, kd, one_pass, learnt, seed, classes in cases:
        student = lab.student(learner, kd, one_pass, backbone=backbone, learnt=learnt, seed=seed)
        files.append(lab.digests(student, classes=classes))
    assert len({f["backbone.bin"] for f in files}) == 1
    assert len({f["prompts.bin"] for f in files}) == len(files)
    other = lab.digests(lab.student("coda", backbone=lab.backbone(seed=1)))
    assert other["backbone.bin"] != files[0]["backbone.bin"]


@pytest.mark.parametrize("learner", LEARNERS)
def test_prompts_bin_holds_learnt_values_only(lab, learner):
    """It is what an update sends: it may not carry tables of the backbone's size."""
    student = lab.student(learner)
    learnt = sum(p.numel() for p in student.parameters()) + 3 * 32  # and the KD token's query, key and value
    size = len(lab.artefact(student)[0].constants["prompts.bin"])
    assert size <= 4 * learnt + 64 * 80


def test_class_names_and_preprocessing_travel_inside(lab):
    artefact, _ = lab.artefact(lab.student("apt"))
    props = {p.key: json.loads(p.value) for p in onnx.load_from_string(artefact.models["student"]).metadata_props}
    assert props["classes"] == ["a"]


def test_export_leaves_the_student_alone(lab):
    student, pixels = lab.student("dualprompt"), lab.pixels(2)
    before = {k: v.clone() for k, v in {**student.state_dict(), **student.backbone.state_dict()}.items()}
    expected = lab.truth(student, pixels)
    lab.artefact(student)
    for name, value in {**student.state_dict(), **student.backbone.state_dict()}.items():
        assert torch.equal(value, before[name]), name
    np.testing.assert_array_equal(lab.truth(student, pixels)["logits"], expected["logits"])
