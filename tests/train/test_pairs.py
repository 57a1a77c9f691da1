"""Every distiller with every learner: it trains, comes back from its folder and becomes a graph, or is refused."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cdl_edge.errors import InputError
from cdl_edge.export.assembly import assemble
from cdl_edge.export.student_graph import StudentGraph
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.evaluate import evaluate_run
from cdl_edge.train.learners import LEARNERS
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run


@pytest.fixture(scope="module")
def photos(tmp_path_factory, image_folder):
    return image_folder(tmp_path_factory.mktemp("p"), train=dict.fromkeys("abcde", 3), val=dict.fromkeys("abcde", 2))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One teacher a learner is enough for all distillers."""
    return tmp_path_factory.mktemp("teachers")


def graph_of(run, folder):
    """(1, S, S, 3) uint8 -> logits, in ONNX Runtime."""
    graph = StudentGraph(run.student, run.preprocessing, len(run.metrics.document["classes"]), 1).build()
    artefact = assemble({"student": graph}, {})
    folder.mkdir()
    (folder / "student.onnx").write_bytes(artefact.models["student"])
    for name, content in artefact.constants.items():
        (folder / name).write_bytes(content)
    onnx.checker.check_model(str(folder / "student.onnx"))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "student.onnx"), settings, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits"], {"images": pixels})[0]


@pytest.mark.slow
@pytest.mark.parametrize("distill", DISTILLERS)
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_pair(tmp_path, make_config, photos, kept, learner, distill):
    options = {
        "data": f"folder:{photos}",
        "learner": learner,
        "distill": distill,
        "epochs": 1,
        "limit_per_class": None,
        "teachers": str(kept),
        "learning_rate": 0.003,
    }
    kind = DISTILLERS[distill]
    if learner == "frozen" and distill != "none":
        with pytest.raises(InputError, match="nothing that could be taught"):
            make_config(tmp_path / "run", **options)
        return
    if not kind.works_with(LEARNERS[learner]):
        with pytest.raises(InputError, match=f"--distill {distill}.*--learner {learner}"):
            make_config(tmp_path / "run", **options)
        return
    metrics = train(make_config(tmp_path / "run", **options), quiet=True)
    assert (metrics["teacher"] is not None) == kind.needs_teacher
    assert all(math.isfinite(v) for task in metrics["student"]["loss"] for v in task)
    measured = evaluate_run(tmp_path / "run", f"folder:{photos}")["average_accuracy"]
    assert measured == pytest.approx(metrics["student"]["average_accuracy"])
    run = load_run(tmp_path / "run")
    assert (run.student.kd is not None) == kind.kd_token and (run.student.mapped is not None) == kind.maps_prompts
    answer = graph_of(run, tmp_path / "graph")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    from cdl_edge.train.augment import Normalise

    with torch.no_grad():
        inputs = run.student.prepare(Normalise(run.preprocessing, torch.device("cpu"))(pixels))
        expected = run.student.combine(run.student(inputs)).numpy()
    got = np.concatenate([answer(pixels[i : i + 1]) for i in range(2)])
    assert np.abs(got - expected).max() <= 1e-4
