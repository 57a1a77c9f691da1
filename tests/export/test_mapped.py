"""CDL-Prompt's graphs: a mapped entry is a constant, CODA's mixture is mapped in the graph; both equal the student."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from cdl_edge.data import load_dataset
from cdl_edge.export.export_bundle import export
from cdl_edge.export.parity import TOLERANCE
from cdl_edge.runtime import load
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.evaluate import evaluate_run
from cdl_edge.train.loop import train
from cdl_edge.train.student import ModelSpec, PromptedViT

POOLS = ("l2p", "dualprompt", "coda")
TASKS = 4


@pytest.fixture
def student(lab):
    """student(learner, kd, teacher, learnt): everything random, and both sides' entries in use not the same ones."""

    @torch.no_grad()
    def make(learner, kd=None, teacher=(48, 6), learnt=lab.learnt, seed=1, backbone=None):
        model = PromptedViT(
            backbone or lab.backbone(), ModelSpec(learner, lab.classes, TASKS, seed, kd=kd, alpha=0.3, mapped=teacher)
        )
        generator = torch.Generator().manual_seed(seed)
        for task in range(learnt):
            for side in (model.learner, model.mapped.teacher):
                side.begin_task(task)
        for p in model.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator)
        if learner == "l2p":
            for side, count in ((model.learner, 11), (model.mapped.teacher, 9)):
                side.used[torch.randperm(30, generator=generator)[:count]] = True
        return model.eval().requires_grad_(False)

    return make


def assert_equal(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        difference = np.abs(got[name] - value)
        assert difference.max() <= TOLERANCE, f"{name}: max {difference.max():.2e}, mean {difference.mean():.2e}"


@pytest.mark.quick("l2p-kd")
@pytest.mark.parametrize("kd", [None, (12, 6)], ids=["no-kd", "kd"])
@pytest.mark.parametrize("learner", POOLS)
def test_the_graph_is_the_student(lab, student, learner, kd):
    model, pixels = student(learner, kd), lab.pixels()
    expected = lab.truth(model, pixels)
    assert np.ptp(expected["logits"], axis=0).max() > 0.05, "the logits must depend on the image"
    graph = lab.export(model)
    assert_equal(graph.each(pixels), expected)
    # Without the teacher's rows it would be another student.
    model.mapped = None
    assert np.abs(lab.truth(model, pixels)["logits"] - expected["logits"]).max() > 100 * TOLERANCE


@pytest.mark.quick("dualprompt-dynamic")
@pytest.mark.parametrize("batch", [None, 3], ids=["dynamic", "static"])
@pytest.mark.parametrize("learner", POOLS)
def test_batches(lab, student, learner, batch):
    model, pixels = student(learner), lab.pixels(3)
    assert_equal(lab.export(model, batch=batch).run(pixels), lab.truth(model, pixels))


@pytest.mark.quick("l2p-narrower", "dualprompt-deeper")
@pytest.mark.parametrize("teacher", [(16, 6), (32, 12), (40, 3)], ids=["narrower", "deeper", "shallower"])
@pytest.mark.parametrize("learner", POOLS)
def test_other_teachers(lab, student, learner, teacher):
    model = student(learner, teacher=teacher)
    assert_equal(lab.export(model).each(lab.pixels(3)), lab.truth(model, lab.pixels(3)))


@pytest.mark.quick("l2p-1")
@pytest.mark.parametrize("learnt", [1, 4])
@pytest.mark.parametrize("learner", POOLS)
def test_other_numbers_of_tasks(lab, student, learner, learnt):
    model = student(learner, learnt=learnt)
    assert_equal(lab.export(model).each(lab.pixels(3)), lab.truth(model, lab.pixels(3)))


@pytest.mark.parametrize("learner", POOLS)
def test_prompt_weights_are_the_students_own(lab, student, learner):
    model = student(learner)
    with_teacher = lab.export(model)
    model.mapped = None
    assert with_teacher.outputs == lab.export(model).outputs


@pytest.mark.parametrize("learner", POOLS)
def test_entries_fold_and_only_codas_mixture_attends(lab, student, learner):
    kinds = Counter(node.op_type for node in lab.export(student(learner)).proto.graph.node)
    assert kinds["Softmax"] == {"l2p": 0, "dualprompt": 0, "coda": 5}[learner]


@pytest.mark.slow
@pytest.mark.parametrize("learner", POOLS)
def test_the_mapping_is_in_the_file_of_what_is_learnt(lab, student, learner):
    backbone = lab.backbone()
    one, two = (student(learner, seed=s, backbone=backbone) for s in (1, 2))
    if learner == "l2p":
        for side, other in ((two.learner, one.learner), (two.mapped.teacher, one.mapped.teacher)):
            side.used.copy_(other.used)
    first, second = lab.digests(one), lab.digests(two)
    assert first["student.onnx"] == second["student.onnx"]
    assert (
        first["backbone.bin"]
        == second["backbone.bin"]
        == lab.digests(lab.student("apt", backbone=backbone))["backbone.bin"]
    )
    assert first["prompts.bin"] != second["prompts.bin"]
    graph = lab.export(one)
    for tensor in graph.proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert tensor.data_type == onnx.TensorProto.INT64, tensor.name


@pytest.mark.slow
@pytest.mark.parametrize("learner", POOLS)
def test_what_is_sent_does_not_grow_with_the_teachers_width(lab, student, learner):
    """A mapped row has the student's width; no table of the mapping itself is left."""
    sizes = []
    for width in (32, 320):
        graph = lab.artefact(student(learner, teacher=(width, 6)))[0]
        sizes.append(len(graph.constants["prompts.bin"]))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("learner", POOLS)
def test_from_training_to_the_device_without_the_teacher(tmp_path, tiny_vit, short_training, learner):
    weights = tmp_path / "teacher.safetensors"
    shutil.copy(tiny_vit("teacher", 24).removeprefix("file:"), weights)
    run, options = tmp_path / "run", {**short_training, "teacher": f"file:{weights}", "learner": learner}
    train(TrainConfig("digits", str(run), distill="cdl-prompt", tasks=2, limit_per_class=8, **options), quiet=True)
    weights.unlink()
    result = export(run, tmp_path / "bundle", images=64)
    assert result["parity"]["max_abs_error"] <= TOLERANCE
    trained = evaluate_run(run, "digits")
    for name in ("average_accuracy", "forgetting"):
        assert result["accuracy"][name] == pytest.approx(trained[name], abs=1e-6), name
    with load(tmp_path / "bundle", "onnxruntime") as runner:
        assert runner.bundle.manifest.document["distiller"] == "cdl-prompt"
        pixels = load_dataset("digits").val.decode(runner.bundle.preprocessing).pixels[:2]
        assert runner.infer(pixels).shape == (2, 10)
