from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from cdl_edge.export.graph import FROZEN, LEARNT, StudentGraph
from cdl_edge.export.model import Artefact, assemble
from cdl_edge.train.augment import Normalise

LEARNERS = ("l2p", "dualprompt", "coda", "apt")


def artefact_of(student, preprocessing, classes, batch=1) -> Artefact:
    builder = StudentGraph(student, preprocessing, classes, batch)
    graph = builder.build()
    outputs = {"logits": [classes]}
    if builder.weights:
        outputs["prompt_weights"] = [len(builder.weights), builder.entries]
    return assemble(graph, preprocessing.size, outputs, {"classes": []})


def session_of(artefact: Artefact, folder: Path) -> ort.InferenceSession:
    for name, content in {"student.onnx": artefact.model, **artefact.constants}.items():
        (folder / name).write_bytes(content)
    onnx.checker.check_model(str(folder / "student.onnx"), full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / "student.onnx"), options, providers=["CPUExecutionProvider"])


def pixels_of(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@torch.no_grad()
def expected(student, preprocessing, pixels, classes):
    output = student(student.embed(Normalise(preprocessing, torch.device("cpu"))(pixels)))
    return student.combine(output)[:, :classes].numpy(), output.prompt_weights


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("kd", [False, True])
@pytest.mark.parametrize("learner", LEARNERS)
def test_graph_equals_student(make_student, preprocessing, tmp_path, learner, kd, one_pass):
    student = make_student(learner, kd, one_pass)
    session = session_of(artefact_of(student, preprocessing, 9), tmp_path)
    pixels = pixels_of(6)
    logits, weights = expected(student, preprocessing, pixels, 9)
    got = [session.run(None, {"images": p[None]}) for p in pixels]
    assert np.abs(np.concatenate([g[0] for g in got]) - logits).max() <= 1e-4
    if weights is None:
        assert len(got[0]) == 1
    else:
        kept = weights.numpy()
        kept = kept[..., np.isfinite(kept[0, 0])]  # L2P: entries that were never used are cut off
        assert np.abs(np.concatenate([g[1] for g in got]) - kept).max() <= 1e-4


@pytest.mark.parametrize("kind", ["stem", "padded"])
def test_convolutional_stem(make_student, preprocessing, tmp_path, kind):
    student = make_student("coda", kind=kind)
    session = session_of(artefact_of(student, preprocessing, 9), tmp_path)
    pixels = pixels_of(4)
    logits, _ = expected(student, preprocessing, pixels, 9)
    got = np.concatenate([session.run(["logits"], {"images": p[None]})[0] for p in pixels])
    assert np.abs(got - logits).max() <= 1e-4


@pytest.mark.parametrize("batch", [4, None])
@pytest.mark.parametrize("learner", LEARNERS)
def test_batches_and_their_independence(make_student, preprocessing, tmp_path, learner, batch):
    student = make_student(learner)
    session = session_of(artefact_of(student, preprocessing, 9, batch), tmp_path)
    pixels = pixels_of(4)
    logits, _ = expected(student, preprocessing, pixels, 9)
    got = session.run(["logits"], {"images": pixels})[0]
    assert np.abs(got - logits).max() <= 1e-4
    mates = pixels.copy()
    mates[1:] = 255 - mates[1:]
    assert np.abs(session.run(["logits"], {"images": mates})[0][0] - got[0]).max() <= 1e-5


def test_heads_are_cut_to_what_is_learnt(make_student, preprocessing, tmp_path):
    student = make_student("dualprompt", learnt=2)
    artefact = artefact_of(student, preprocessing, 6)
    session = session_of(artefact, tmp_path)
    assert session.get_outputs()[0].shape == [1, 6]
    assert session.get_outputs()[1].shape == [1, 3, 2], "three expert blocks, two tasks learnt of three"


@pytest.mark.parametrize("learner", LEARNERS)
def test_frozen_constants_do_not_depend_on_what_was_learnt(make_student, preprocessing, learner):
    one = artefact_of(make_student(learner), preprocessing, 9)
    other_student = make_student(learner)
    for parameter in other_student.parameters():
        parameter.data.mul_(1.5)
    for buffer in other_student.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1.5)
    other = artefact_of(other_student, preprocessing, 9)
    assert one.constants[FROZEN] == other.constants[FROZEN]
    assert one.constants[LEARNT] != other.constants[LEARNT]
    assert one.model == other.model, "a new task's values alone must not change the graph"
    assert one.constants[FROZEN] == artefact_of(make_student("apt"), preprocessing, 9).constants[FROZEN]


def test_nothing_learnt_hides_in_the_graph(make_student, preprocessing):
    model = onnx.load_from_string(artefact_of(make_student("coda"), preprocessing, 9).model)
    inline = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert inline
    assert all(t.data_type == onnx.TensorProto.INT64 for t in inline)
