"""One side of a run on one task: the loss of a step, the rate, what the teacher is asked, who learns."""

import itertools

import numpy as np
import pytest
import torch

from cdl_edge.train import phase as module
from cdl_edge.train.batches import Batch, TaskImages, images_seen
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.loop import _Training
from cdl_edge.train.phase import Phase, TeacherOutputs, rate

LEARNERS = ("l2p", "dualprompt", "coda", "apt")
SPAN = (5, 10)


class Bench:
    """A training at the start of task 2, ready for steps of one side."""

    def __init__(self, config, name="student"):
        self.made, self.name = _Training(config, False, True), name
        for model in self.made.models.values():
            for task in (0, 1):
                model.learner.begin_task(task)
                if task == 0:
                    model.learner.end_task(task)
        self.phase = self.phase_of(name)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randn(6, 5, 16 if name == "student" else 24, generator=generator)
        self.query = torch.randn(6, 16, generator=generator)
        self.labels = torch.arange(6) % 5
        self.said = torch.randn(6, 5, generator=generator)

    def phase_of(self, name, augmented=False):
        made = self.made
        return Phase(made.config, made.devices, made.models, name, 1, SPAN, augmented, made.distiller)

    def loss(self, rows=slice(None)):
        tokens, query = {self.name: self.tokens[rows]}, {self.name: self.query[rows]}
        batch = Batch(np.arange(6)[rows], self.labels[rows] + SPAN[0], tokens, query)
        return self.phase._loss(batch, TeacherOutputs(self.said[rows]))

    def images(self, count=11):
        made = self.made
        split = made.scenario.split(made.dataset.train, 1).take(np.arange(count))
        return TaskImages(split, made.pipelines, made.devices.device)


@pytest.fixture
def bench(tmp_path, make_config):
    numbers = itertools.count()
    return lambda name="student", **changes: Bench(
        make_config(tmp_path / str(next(numbers)), **{"precision": "fp32", **changes}), name
    )


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_loss_knows_the_current_classes_only(bench, learner):
    at = bench(learner=learner)
    model = at.made.models["student"]
    loss = at.loss()
    loss.backward()
    for head in (model.head, model.kd_head):
        assert head.weight.grad[:5].abs().max() == 0 and head.weight.grad[5:].abs().max() > 0
        head.weight.data[:5] += 100
    assert at.loss().item() == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_loss_does_not_depend_on_how_the_batch_is_cut(bench, learner):
    at = bench(learner=learner)
    with torch.no_grad():
        whole = at.loss().item()
        parts = [at.loss(slice(i, i + 2)).item() for i in (0, 2, 4)]
    assert whole == pytest.approx(sum(parts) / 3, rel=1e-5)


def test_the_teachers_loss_is_cross_entropy_and_key_loss(bench):
    at = bench("teacher", learner="dualprompt")
    with torch.no_grad():
        output = at.made.models["teacher"](at.tokens, at.query, training=True)
        expected = torch.nn.functional.cross_entropy(output.cls_logits[:, 5:], at.labels) + output.key_loss
        assert at.loss().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("learner", "terms"), [("l2p", 5), ("dualprompt", 3)])
def test_compat_sums_the_key_loss_and_counts_it_twice(bench, learner, terms):
    # Five entries of L2P, three blocks of DualPrompt; trap 3: two GPUs, summed replica means.
    one, two = bench(learner=learner), bench(learner=learner, compat=True)
    two.made.models["student"].load_state_dict(one.made.models["student"].state_dict())
    with torch.no_grad():
        key = one.made.models["student"](one.tokens, one.query, training=True).key_loss.item()
        assert key > 0.01
        assert two.loss().item() - one.loss().item() == pytest.approx((2 * terms - 1) * key, rel=1e-4)


# -- the rate ---------------------------------------------------------------------------------------------------------


def test_rate():
    config = TrainConfig("digits", "x", epochs=4, learning_rate=0.5)
    rates = [rate(config, e, 4, s, 10) for e in range(4) for s in range(10)]
    assert rates[0] == 0.5 and rates[20] == pytest.approx(0.25) and 0 < rates[-1] < 0.01
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_compat_is_the_authors_quarter_of_a_cosine():
    config = TrainConfig("digits", "x", epochs=20, learning_rate=1e-3, compat=True)
    rates = [rate(config, e, 20, 3, 10) for e in range(20)]
    # By a schedule of the authors' kind, run elsewhere: epoch 1 repeats epoch 0, the last one is far from 0.
    assert rates[0] == rates[1] == 1e-3
    assert [round(1e6 * r, 2) for r in (rates[2], rates[10], rates[11], rates[19])] == [996.65, 740.74, 683.34, 97.4]
    assert sum(rates) / 20 == pytest.approx(0.6850887e-3, abs=1e-9)
    assert rate(config, 5, 20, 0, 10) == rate(config, 5, 20, 9, 10)  # one value an epoch
    assert rate(TrainConfig("digits", "x", epochs=1, compat=True), 0, 1, 0, 10) == 1e-3


def test_the_rate_of_retraining_starts_again_at_a_tenth():
    config = TrainConfig(
        "digits", "x", learner="finetune", distill="m2kd", epochs=4, learning_rate=0.5, retrain_epochs=2
    )
    rates = [rate(config, e, 4, s, 10) for e in (4, 5) for s in range(10)]
    assert rates[0] == pytest.approx(0.05) and rates[10] == pytest.approx(0.025) and 0 < rates[-1] < 0.001


def test_compat_leaves_out_the_last_step_that_is_not_full(bench):
    seen = []
    for compat in (False, True):
        at = bench(compat=compat, distill="none", batch_size=4, epochs=1)
        real = at.phase._loss
        at.phase._loss = lambda b, s, real=real: seen[-1].append(len(b.index)) or real(b, s) * 0 + 2.0
        seen.append([])
        (done,) = at.phase.epochs(at.images(), 0, None)
        assert done.loss == pytest.approx(2.0)  # the mean of what was seen
    assert seen == [[4, 4, 3], [4, 4]]
    assert [images_seen(n, 4, True) for n in (3, 4, 7, 8)] == [3, 4, 4, 8]


def test_the_rate_reaches_the_optimiser(bench, monkeypatch):
    at = bench(epochs=2, batch_size=4)
    seen = []
    real = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: seen.append(self.param_groups[0]["lr"]) or real(self))
    list(at.phase.epochs(at.images(), 0, None))
    assert seen == [rate(at.made.config, e, 2, s, 3) for e in range(2) for s in range(3)]


# -- what the teacher is asked ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("distill", ["kd", "fitnets"])
def test_all_answers_are_those_of_each_step(bench, distill, monkeypatch):
    at = bench(distill=distill, learner="coda")
    images = at.images()
    monkeypatch.setattr(module, "CHUNK", 4)
    whole = at.phase._all_outputs(images)
    assert whole.logits.shape == (11, 5) and len(whole.hidden) == (6 if distill == "fitnets" else 0)
    index = np.array([7, 2, 10])
    step = at.phase._teacher_outputs(images.batch(index, ["teacher"], at.made.devices.autocast))
    assert torch.allclose(whole.at(torch.from_numpy(index)).logits, step.logits, atol=1e-4)
    for kept, fresh in zip(whole.hidden, step.hidden, strict=True):
        assert torch.allclose(kept[index], fresh, atol=1e-4)
    assert not whole.logits.requires_grad


@pytest.mark.slow
def test_answers_that_do_not_fit_into_memory_are_asked_again_at_each_step(bench, monkeypatch):
    losses = []
    for kept in (module.KEPT_BYTES, 10):
        at = bench(distill="reviewkd", epochs=2, batch_size=4)
        monkeypatch.setattr(module, "KEPT_BYTES", kept)
        losses.append([done.loss for done in at.phase.epochs(at.images(), 0, None)])
        assert (at.phase.outputs is None) == (kept == 10)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_given_logits_are_not_asked_for_again(bench, monkeypatch):
    at = bench(distill="kdp", epochs=1, batch_size=4)
    images = at.images()
    said = at.phase._all_outputs(images)
    monkeypatch.setattr(Phase, "_teacher_outputs", lambda *_: pytest.fail("the teacher was asked"))
    assert len(list(at.phase.epochs(images, 0, TeacherOutputs(said.logits)))) == 1


# -- who learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize("distill", [n for n, d in DISTILLERS.items() if d.needs_teacher])
def test_only_the_side_whose_turn_it_is_learns(bench, distill, name):
    at = bench(distill=distill, learner="l2p", epochs=1, batch_size=4)
    other = at.made.models["teacher" if name == "student" else "student"]
    model, distiller = at.made.models[name], at.made.distiller
    parts = {"model": model, "other": other, "distiller": distiller}
    before = {k: {n: v.clone() for n, v in m.named_parameters()} for k, m in parts.items()}
    grads = []
    real = at.phase.devices.sum_gradients
    at.phase.devices.sum_gradients = lambda p: grads.extend(q.grad for q in other.parameters()) or real(p)
    list(at.phase_of(name).epochs(at.images(), 0, None))
    moved = {k: [n for n, v in m.named_parameters() if not torch.equal(v, before[k][n])] for k, m in parts.items()}
    assert moved["other"] == [] and grads and all(g is None for g in grads)
    assert "head.weight" in moved["model"] and any(n.startswith("learner.") for n in moved["model"])
    expected = [n for n, _ in distiller.named_parameters()] if name == "student" else []
    assert moved["distiller"] == expected
    for side in at.made.sides.values():
        assert all(p.grad is None for p in side.backbone.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("distill", ["blockwise", "reviewkd"])
def test_a_whole_network_as_teacher_does_not_learn_from_its_student(bench, distill):
    at = bench(distill=distill, learner="finetune", epochs=1, batch_size=4, learning_rate=0.003)
    teacher = at.made.models["teacher"]
    before = {n: v.clone() for n, v in teacher.named_parameters()}
    list(at.phase.epochs(at.images(), 0, None))
    assert all(torch.equal(v, before[n]) and v.grad is None for n, v in teacher.named_parameters())
    again = at.phase_of("teacher")  # and in the next task it learns again
    list(again.epochs(at.images(), 0, None))
    assert all(not torch.equal(v, before[n]) for n, v in teacher.named_parameters() if n.endswith("mlp.fc1.weight"))


def test_an_epoch_counts_each_image_once_in_its_mean(bench, monkeypatch):
    # 11 images in steps of 4: the last step of 3 weighs 3 / 11.
    at = bench(distill="none", epochs=1, batch_size=4)
    values = iter([1.0, 2.0, 4.0])
    monkeypatch.setattr(Phase, "_loss", lambda self, *_: self.model.head.bias.sum() * 0 + next(values))
    (done,) = at.phase.epochs(at.images(), 0, None)
    assert done.loss == pytest.approx((4 * 1.0 + 4 * 2.0 + 3 * 4.0) / 11) and done.epoch == 1


@pytest.mark.slow
@pytest.mark.parametrize("distill", ["none", "kdp"])
def test_an_epoch_that_is_resumed_sees_the_same_steps(bench, distill, monkeypatch):
    orders = []
    real = Phase._loss
    monkeypatch.setattr(Phase, "_loss", lambda self, b, s: orders[-1].append(b.index.tolist()) or real(self, b, s))
    for done in (0, 2):
        at = bench(distill=distill, epochs=3, batch_size=4, augment="crop-flip")
        orders.append([])
        list(at.phase_of("student", augmented=True).epochs(at.images(), done, None))
    assert orders[1] == orders[0][6:] and orders[0][:3] != orders[0][3:6]
