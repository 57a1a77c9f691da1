"""CDL-Prompt: what it asks for and refuses, and that the student carries the teacher's pool of the right moment."""

import json
import shutil

import pytest
import torch

from cdl_edge.errors import InputError
from cdl_edge.train import loop
from cdl_edge.train.checkpoint import load_state
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.distill import DISTILLERS, DistillationBatch, DistillSpec
from cdl_edge.train.evaluate import evaluate_run
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run
from cdl_edge.train.student import StudentOutput

POOLS = ("l2p", "dualprompt", "coda")


@pytest.mark.parametrize("learner", POOLS)
def test_pool_learners_are_accepted(learner):
    TrainConfig("digits", "x", learner=learner, distill="cdl-prompt")


@pytest.mark.parametrize("learner", ["apt", "finetune"])
def test_learners_without_rows_are_refused(learner):
    with pytest.raises(InputError, match="attend") as info:
        TrainConfig("digits", "x", learner=learner, distill="cdl-prompt")
    for word in ("--distill cdl-prompt", f"--learner {learner}", "l2p | dualprompt | coda"):
        assert word in str(info.value)


def test_one_pass_is_refused():
    with pytest.raises(InputError, match="one-pass") as info:
        TrainConfig("digits", "x", learner="coda", distill="cdl-prompt", query="one-pass")
    assert "--distill cdl-prompt" in str(info.value) and "two-pass" in str(info.value)


def test_the_loss_is_that_of_kd():
    spec = DistillSpec(0.3, 2.0, 16, 6, 2, 24, 6, 2, 5, ((0, 2), (2, 5)), 0)
    generator = torch.Generator().manual_seed(0)
    logits, said = torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)
    distill_batch = DistillationBatch(
        StudentOutput(logits, None, None, None),
        torch.tensor([0, 1, 2, 0]),
        1,
        (2, 5),
        logits,
        None,
        None,
        teacher_logits=said,
    )
    assert (
        DISTILLERS["cdl-prompt"](spec).loss(distill_batch).item() == DISTILLERS["kd"](spec).loss(distill_batch).item()
    )
    assert not list(DISTILLERS["cdl-prompt"](spec).parameters())  # the mapping is the student's: it is kept


def learner_state(path, prefix):
    state = load_state(path)["state"]
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.slow
@pytest.mark.parametrize("learner", POOLS)
def test_a_run_leaves_a_student_that_needs_no_teacher(tmp_path, make_config, tiny_vit, learner):
    weights = tmp_path / "teacher.safetensors"
    shutil.copy(tiny_vit("teacher", 24).removeprefix("file:"), weights)
    config = make_config(tmp_path / "run", learner=learner, distill="cdl-prompt", teacher=f"file:{weights}")
    train(config, quiet=True)
    carried = learner_state(tmp_path / "run" / "student.safetensors", "mapped.teacher.")
    theirs = learner_state(tmp_path / "run" / "teacher.safetensors", "learner.")
    assert carried.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in carried.items())
    weights.unlink()
    run = load_run(tmp_path / "run")
    assert run.student.mapped is not None and run.student.mapped.teacher.learnt == 2
    measured = evaluate_run(tmp_path / "run", "digits")
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["student"]
    assert measured["average_accuracy"] == pytest.approx(trained["average_accuracy"], abs=1e-6)


@pytest.mark.slow
def test_the_mapping_has_learnt(tmp_path, make_config):
    train(make_config(tmp_path / "run", learner="l2p", distill="cdl-prompt"), quiet=True)
    trained = load_run(tmp_path / "run")
    metrics = trained.metrics.document["backbones"]["teacher"]
    config = trained.config
    fresh = loop.build_model(
        config, trained.backbone, 10, 16, is_student=True, teacher=(metrics["width"], metrics["depth"])
    )
    for name, value in fresh.mapped.attention.state_dict().items():
        moved = (trained.student.mapped.attention.state_dict()[name] - value).abs().max()
        assert moved > 0 or name.endswith("key.bias"), name


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["l2p", "coda"])
def test_a_run_stopped_at_every_checkpoint_is_the_same_run(tmp_path, make_config, monkeypatch, learner):
    options = {"learner": learner, "distill": "cdl-prompt"}
    train(make_config(tmp_path / "whole", **options), quiet=True)
    real, stops, finished = loop.save_state, 0, False

    def save(path, state):
        real(path, state)
        raise Stopped

    monkeypatch.setattr(loop, "save_state", save)
    while not finished:
        torch.manual_seed(stops)
        try:
            train(make_config(tmp_path / "broken", **options), resume=stops > 0, quiet=True)
            finished = True
        except Stopped:
            stops += 1
    assert stops >= 6
    whole, broken = (load_state(tmp_path / n / "student.safetensors")["state"] for n in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    for name, value in whole.items():
        assert torch.equal(value, broken[name]), name


@pytest.mark.slow
def test_a_kept_teacher_gives_the_same_student(tmp_path, make_config):
    options = {"learner": "dualprompt", "distill": "cdl-prompt", "teachers": str(tmp_path / "teachers")}
    first = train(make_config(tmp_path / "first", **options), quiet=True)
    again = train(make_config(tmp_path / "again", **options), quiet=True)
    assert again["teacher"]["tasks_reused"] == [0, 1]
    assert first["student"]["matrix"] == again["student"]["matrix"]
    one, two = (load_state(tmp_path / n / "student.safetensors")["state"] for n in ("first", "again"))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
