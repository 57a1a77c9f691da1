"""M2KD: the loss by hand, who is asked what, and runs that were stopped."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import train_options
from safetensors.torch import load_file
from torch import nn

from cdl_edge.train import loop
from cdl_edge.train.checkpoint import load_state, save_state
from cdl_edge.train.distill import DISTILLERS, DistillationBatch, DistillSpec
from cdl_edge.train.distill.m2kd import AUXILIARY, M2KD
from cdl_edge.train.learners import LEARNERS
from cdl_edge.train.loop import train
from cdl_edge.train.student import ModelSpec, PromptedViT

SPANS = ((0, 2), (2, 4), (4, 6))


def spec(**changes):
    sizes = {"student_width": 16, "student_depth": 6, "student_grid": 2}
    teacher = {"teacher_width": 0, "teacher_depth": 0, "teacher_grid": 0}
    return DistillSpec(
        **{"alpha": 0.3, "tau": 2.0, **sizes, **teacher, "classes": 6, "class_ranges": SPANS, "seed": 0} | changes
    )


def make(backbone, learner):
    return PromptedViT(backbone.model, ModelSpec(learner, 6, 3, seed=0)).eval()


def lesson_of(model, task, labels=(0, 1, 1, 0), seed=3):
    images = torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    inputs = model.prepare(images)
    query = model.query(inputs) if model.two_pass else None
    output = model(inputs, query, training=True, hidden=True)
    return DistillationBatch(output, torch.tensor(labels), task, SPANS[task], inputs, query, model)


def learn(model, distiller, task, steps=3):
    """Some steps as in a phase."""
    model.learner.begin_task(task)
    distiller.begin_task(task, model, None)
    optimiser = torch.optim.Adam([*model.trainable(), *distiller.parameters()], lr=0.01)
    for step in range(steps):
        loss = distiller.loss(lesson_of(model, task, seed=step))
        optimiser.zero_grad()
        loss.backward()
        distiller.before_step(model)
        optimiser.step()
    model.learner.end_task(task)
    distiller.end_task(task, model)


def softmax(row, tau=1.0):
    e = [math.exp((v - max(row)) / tau) for v in row]
    return [v / sum(e) for v in e]


def by_hand(answer, old, distill_batch, alpha, tau):
    """The two parts of one level: lists of rows; old: rows of each snapshot."""
    count, (low, high) = len(answer), distill_batch.class_range
    labels = distill_batch.labels.tolist()
    hard = sum(-math.log(softmax(r[low:high])[y]) for r, y in zip(answer, labels, strict=True)) / count
    soft = 0.0
    for i, rows in enumerate(old):
        first, last = SPANS[i]
        for mine, its in zip(answer, rows, strict=True):
            p, q = softmax(its[first:last], tau), softmax(mine[first:last], tau)
            soft += tau * tau * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / count
    return (1 - alpha) * hard + alpha * soft


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["finetune", "l2p", "apt"])
@pytest.mark.parametrize(("alpha", "tau"), [(0.3, 2.0), (0.5, 4.0)])
def test_the_loss(backbone, learner, alpha, tau):
    model, distiller = make(backbone, learner), M2KD(spec(alpha=alpha, tau=tau))
    held = lesson_of(model, 0)
    old = ([], [])
    for task in range(3):
        distill_batch = lesson_of(model, task)
        middle = nn.functional.layer_norm(distill_batch.student.hidden[2][:, 0], (16,))
        levels = (distill_batch.student.cls_logits, distiller.auxiliary(middle))
        expected = [by_hand(a.tolist(), o, distill_batch, alpha, tau) for a, o in zip(levels, old, strict=True)]
        assert distiller.loss(distill_batch).item() == pytest.approx(expected[0] + AUXILIARY * expected[1], rel=1e-4)
        learn(model, distiller, task)
        # What the model says now, with what inference uses, is what its snapshot will say.
        with torch.no_grad():
            output = model(held.inputs, held.query, hidden=True)
            middle = nn.functional.layer_norm(output.hidden[2][:, 0], (16,))
            old[0].append(output.cls_logits.tolist())
            old[1].append(distiller.auxiliary(middle).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["finetune", "dualprompt", "coda", "apt"])
def test_a_snapshot_answers_as_the_model_did(backbone, learner):
    model, distiller = make(backbone, learner), M2KD(spec())
    answers = []
    for task in range(2):
        learn(model, distiller, task)
        held = lesson_of(model, task)
        with torch.no_grad():
            output = model(held.inputs, held.query, hidden=True)
            parameters = dict(distiller.auxiliary.named_parameters())
            answers.append((output.cls_logits, distiller.read(output.hidden, parameters)))
    learn(model, distiller, 2)
    for i, (logits, auxiliary) in enumerate(answers):
        got = distiller.ask(i, lesson_of(model, 2))
        assert torch.equal(got[0], logits) and torch.equal(got[1], auxiliary)
        assert not got[0].requires_grad and not got[1].requires_grad


def test_what_was_kept_does_not_move_while_the_rest_learns(backbone):
    model, distiller = make(backbone, "finetune"), M2KD(spec())
    learn(model, distiller, 0)
    before = {k: v.clone() for k, v in model.network.named_parameters()}
    model.learner.begin_task(1)
    optimiser = torch.optim.Adam(model.trainable(), lr=0.01)
    distiller.loss(lesson_of(model, 1)).backward()
    distiller.before_step(model)
    optimiser.step()
    for name, weight in model.network.named_parameters():
        kept = distiller.snapshots.owners[name] > 0
        assert torch.equal(weight[kept], before[name][kept]), name
    weight = model.network.blocks[3].mlp.fc2.weight
    kept = distiller.snapshots.owners["blocks.3.mlp.fc2.weight"] > 0
    assert (weight[~kept] != before["blocks.3.mlp.fc2.weight"][~kept]).all()


def test_old_classes_are_held_by_the_snapshots_alone(backbone):
    model, distiller = make(backbone, "apt"), M2KD(spec())
    learn(model, distiller, 0)
    model.learner.begin_task(1)
    distill_batch = lesson_of(model, 1)
    distill_batch.student.cls_logits.retain_grad()
    distiller.loss(distill_batch).backward()
    gradient = distill_batch.student.cls_logits.grad.abs().sum(dim=0)
    assert (gradient[:4] > 0).all() and (gradient[4:] == 0).all()  # nothing is said of classes to come


def test_exemplars_are_told_apart_from_all_classes_seen(backbone):
    """Cross entropy over the classes of tasks 0..k, for the images of the task and those of earlier ones."""
    model, distiller = make(backbone, "apt"), M2KD(spec(exemplars=True))
    learn(model, distiller, 0)
    distill_batch = lesson_of(model, 1, labels=(0, 1, -2, -1))  # the last two are of classes 0 and 1
    middle = nn.functional.layer_norm(distill_batch.student.hidden[2][:, 0], (16,))
    expected = 0.0
    levels = (distill_batch.student.cls_logits, distiller.auxiliary(middle))
    for answer, old, weight in zip(levels, distiller.ask(0, distill_batch), (1.0, AUXILIARY), strict=True):
        rows = answer.tolist()
        hard = sum(-math.log(softmax(r[:4])[y]) for r, y in zip(rows, (2, 3, 0, 1), strict=True)) / 4
        soft = by_hand(rows, [old.tolist()], replace(distill_batch, labels=torch.zeros(4, dtype=torch.long)), 1.0, 2.0)
        expected += weight * (0.7 * hard + 0.3 * soft)
    assert distiller.loss(distill_batch).item() == pytest.approx(expected, rel=1e-4)


def test_tasks_of_one_class_are_defined(backbone):
    class_ranges = ((0, 1), (1, 2), (2, 6))
    model, distiller = make(backbone, "apt"), M2KD(spec(class_ranges=class_ranges))
    for task in range(2):
        distiller.end_task(task, model)
    distill_batch = lesson_of(model, 2)
    assert math.isfinite(distiller.loss(distill_batch).item())


def test_the_middle_of_the_depth():
    assert [M2KD(spec(student_depth=d)).middle for d in (1, 2, 3, 6, 12)] == [0, 0, 0, 2, 5]


def test_the_auxiliary_head_starts_from_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = M2KD(spec()), M2KD(spec()), M2KD(spec(seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.auxiliary.weight, two.auxiliary.weight)
    assert not torch.equal(one.auxiliary.weight, other.auxiliary.weight)
    assert [n for n, _ in one.named_parameters()] == ["auxiliary.weight", "auxiliary.bias"]


def test_its_state_goes_through_a_checkpoint(backbone, tmp_path):
    model, distiller = make(backbone, "finetune"), M2KD(spec())
    for task in range(2):
        learn(model, distiller, task)
    save_state(tmp_path / "c.safetensors", {"distiller": distiller.state_dict()})
    fresh = M2KD(spec(seed=9))
    fresh.load_state_dict(load_state(tmp_path / "c.safetensors")["distiller"])
    distill_batch = lesson_of(model, 2)
    assert fresh.loss(distill_batch).item() == distiller.loss(distill_batch).item()
    assert fresh.report() == distiller.report() != {}


def test_the_registry():
    assert list(DISTILLERS) == [
        "none",
        "kd",
        "dkd",
        "fitnets",
        "reviewkd",
        "two-heads",
        "kd-token",
        "kdp",
        "cdl-prompt",
        "blockwise",
        "m2kd",
    ]
    assert not M2KD.needs_teacher and M2KD.needs_hidden and not M2KD.kd_token and M2KD.works_with(LEARNERS["apt"])


# -- runs -------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def options(learner):
    rate = 0.003 if learner == "finetune" else 0.02
    return {"learner": learner, "distill": "m2kd", "tasks": 3, "learning_rate": rate, "augment": "crop-flip"}


def assert_same(one, two):
    numbers = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert numbers[0]["student"]["matrix"] == numbers[1]["student"]["matrix"]
    assert numbers[0]["student"]["loss"] == numbers[1]["student"]["loss"]
    assert numbers[0]["distiller"] == numbers[1]["distiller"]
    tensors = [load_file(folder / "student.safetensors") for folder in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["finetune", "l2p"])
def test_stopped_at_every_checkpoint(tmp_path, make_config, monkeypatch, learner):
    train(make_config(tmp_path / "unbroken", **options(learner)), quiet=True)
    real, stops = loop.save_state, 0

    def save(path, state):
        real(path, state)
        raise Stopped

    monkeypatch.setattr(loop, "save_state", save)
    while not (tmp_path / "broken" / "metrics.json").exists():
        torch.manual_seed(stops)
        try:
            train(make_config(tmp_path / "broken", **options(learner)), resume=stops > 0, quiet=True)
        except Stopped:
            stops += 1
    assert stops == 6  # after the first epoch of each task, and after each task
    assert_same(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.slow
def test_every_task_sees_its_images_and_those_kept_of_earlier_classes(tmp_path, make_config, monkeypatch):
    seen = []
    real = loop.TaskImages

    def note(split, *more):
        seen.append(split)
        return real(split, *more)

    monkeypatch.setattr(loop, "TaskImages", note)
    train(make_config(tmp_path / "run", **options("apt"), head="learned", exemplars=2, epochs=1), quiet=True)
    trained = [
        s for s in seen if np.unique(s.labels, return_counts=True)[1].max() == 8
    ]  # the others are for validation
    counts = [[int((s.labels == c).sum()) for c in range(10)] for s in trained]
    assert counts[0] == [8] * 4 + [0] * 6
    assert counts[1] == [2] * 4 + [8] * 3 + [0] * 3
    assert counts[2] == [2] * 7 + [8] * 3
    pixels = [[np.asarray(s.items)[s.labels == c] for c in range(4)] for s in trained]
    for first, second, third in zip(*pixels, strict=True):
        assert (second == third).all()  # the same two, and of those that the task was learnt from
        assert all(any((kept == image).all() for image in first) for kept in second)


def test_retraining_moves_what_the_task_keeps_and_nothing_else(backbone):
    model, distiller = make(backbone, "finetune"), M2KD(spec())
    learn(model, distiller, 0)
    frozen = {k: v.clone() for k, v in model.network.named_parameters()}
    model.learner.begin_task(1)
    optimiser = torch.optim.Adam([*model.trainable(), *distiller.parameters()], lr=0.01)
    states = []
    for epoch in range(3):  # one of learning, two of retraining
        if epoch == 1 and distiller.begin_retraining(1, model):
            optimiser.state.clear()
        states.append({k: v.clone() for k, v in model.network.named_parameters()})
        for step in range(2):
            optimiser.zero_grad()
            distiller.loss(lesson_of(model, 1, seed=10 * epoch + step)).backward()
            distiller.before_step(model)
            optimiser.step()
    name = "blocks.3.mlp.fc2.weight"
    owner, start = distiller.snapshots.owners[name], dict(backbone.model.named_parameters())[name]
    assert [int((owner == i).sum()) for i in range(3)] == [342, 341, 341]
    for when in (states[1][name], dict(model.network.named_parameters())[name]):
        assert torch.equal(when[owner == 0], start[owner == 0])
        assert torch.equal(when[owner == 1], frozen[name][owner == 1])
    assert (dict(model.network.named_parameters())[name][owner == 2] != states[1][name][owner == 2]).all()
    distiller.end_task(1, model)  # nothing is pruned a second time
    assert torch.equal(distiller.snapshots.owners[name], owner) and len(distiller.snapshots) == 2


@pytest.mark.slow
def test_stopped_while_it_retrains(tmp_path, make_config, monkeypatch):
    more = {**options("finetune"), "retrain_epochs": 2, "pruned": "zero", "exemplars": 1, "epochs": 1}
    metrics = train(make_config(tmp_path / "unbroken", **more), quiet=True)
    assert [len(losses) for losses in metrics["student"]["loss"]] == [3, 3, 3]
    real, stops = loop.save_state, 0

    def save(path, state):
        real(path, state)
        raise Stopped

    monkeypatch.setattr(loop, "save_state", save)
    while not (tmp_path / "broken" / "metrics.json").exists():
        try:
            train(make_config(tmp_path / "broken", **more), resume=stops > 0, quiet=True)
        except Stopped:
            stops += 1
    assert stops == 9
    assert_same(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.slow
def test_killed_in_the_middle_of_a_task(tmp_path, make_config):
    """By SIGKILL, as soon as there is a checkpoint of an epoch of the second task."""
    train(make_config(tmp_path / "unbroken", **options("finetune"), epochs=6), quiet=True)
    broken = make_config(tmp_path / "broken", **options("finetune"), epochs=6)
    code = "from cdl_edge.cli import main; main()"
    program = [sys.executable, "-c", code, "train", *train_options(broken), "--threads", "1"]
    checkpoint = Path(broken.out) / "checkpoint.safetensors"
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    position = None
    try:
        until = time.monotonic() + 300
        while position is None or position < (1, "student", 1):
            assert process.poll() is None and time.monotonic() < until
            if checkpoint.exists():
                position = tuple(load_state(checkpoint)["position"])
            time.sleep(0.003)
        time.sleep(random.random() * 0.03)  # anywhere in the epoch, or in the next write
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    task, side, epoch = load_state(checkpoint)["position"]
    assert (task, side, epoch) >= (1, "student", 1) and not (Path(broken.out) / "metrics.json").exists()  # or later
    train(broken, resume=True, quiet=True)
    assert_same(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["finetune", "dualprompt"])
def test_the_metrics_say_what_the_snapshots_cost(tmp_path, make_config, learner):
    metrics = train(make_config(tmp_path / "run", **options(learner)), quiet=True)
    assert metrics["teacher"] is None
    sizes = metrics["distiller"]
    assert sizes["snapshots"] == 3
    assert sizes["total_bytes"] == sizes["network_bytes"] + sizes["owner_map_bytes"] + sizes["learnt_bytes"]
    assert sizes["networks"] == sizes["total_bytes"] / sizes["network_bytes"]
    assert sizes["owner_map_bytes"] == (sizes["network_bytes"] // 4 if learner == "finetune" else 0)
