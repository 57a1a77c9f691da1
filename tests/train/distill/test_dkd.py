"""DKD: target and non-target divergence class by class, also where there are two classes only."""

import math

import pytest
import torch

from cdl_edge.train.distill import DISTILLERS, dkd
from cdl_edge.train.distill.base import divergence
from cdl_edge.train.distill.dkd import decoupled

CLS = [[2.0, 0.0, -1.0, 0.3], [0.5, 0.5, 0.5, 2.0], [-1.0, 4.0, 0.0, 0.0]]
TEACHER = [[3.0, -1.0, 0.0, 1.0], [0.0, 1.0, 2.0, -2.0], [0.2, 0.1, 0.0, 5.0]]
LABELS = [0, 2, 3]


def parts(plain, student, teacher, label, tau):
    """(TCKD, NCKD, p_target of the teacher) of one sample."""
    p, q = plain.softmax(teacher, tau), plain.softmax(student, tau)
    target = p[label] * math.log(p[label] / q[label]) + (1 - p[label]) * math.log((1 - p[label]) / (1 - q[label]))
    others = 0.0
    for j in range(len(p)):
        if j != label:
            a, b = p[j] / (1 - p[label]), q[j] / (1 - q[label])
            others += a * math.log(a / b)
    return target, others, p[label]


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 4.0), (0.2, 1.0)])
def test_dkd(plain, spec, distill_batch, alpha, tau):
    each = [parts(plain, *row, tau) for row in zip(CLS, TEACHER, LABELS, strict=True)]
    term = tau * tau * sum(1.0 * t + 4.0 * n for t, n, _ in each) / 3
    expected = (1 - alpha) * plain.cross_entropy(CLS, LABELS) + alpha * term
    got = DISTILLERS["dkd"](spec(alpha=alpha, tau=tau)).loss(distill_batch(CLS, LABELS, said=TEACHER)).item()
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_its_two_parts_make_up_the_divergence(plain, monkeypatch, tau):
    # KD = TCKD + (1 - p_target) NCKD: the coupling that the paper takes apart.
    for row, said, label in zip(CLS, TEACHER, LABELS, strict=True):
        student, teacher = torch.tensor([row]), torch.tensor([said])
        monkeypatch.setattr(dkd, "TARGET_WEIGHT", 1.0)
        monkeypatch.setattr(dkd, "OTHERS_WEIGHT", 1 - plain.softmax(said, tau)[label])
        got = decoupled(student, teacher, torch.tensor([label]), tau).item()
        assert got == pytest.approx(divergence(student, teacher, tau).item(), rel=1e-4)


def test_equal_logits_are_no_loss():
    x = torch.tensor(CLS)
    assert decoupled(x, x + 3.0, torch.tensor(LABELS), 4.0).item() == pytest.approx(0, abs=1e-5)


def test_two_classes(plain, monkeypatch):
    # One class is not the target: NCKD compares distributions over one class, TCKD alone is the divergence.
    student = torch.tensor([[2.0, -1.0], [0.3, 0.1], [-4.0, 5.0]], requires_grad=True)
    teacher, labels = torch.tensor([[0.5, 1.0], [3.0, -3.0], [1.0, 0.0]]), torch.tensor([0, 1, 0])
    value = decoupled(student, teacher, labels, 4.0)
    assert value.item() == pytest.approx(plain.kl(student.tolist(), teacher.tolist(), 4.0), rel=1e-5)
    value.backward()
    with_others = student.grad.clone()
    assert torch.isfinite(with_others).all() and with_others.abs().min() > 0
    monkeypatch.setattr(dkd, "OTHERS_WEIGHT", 1e6)  # of nothing
    student.grad = None
    again = decoupled(student, teacher, labels, 4.0)
    again.backward()
    assert again.item() == pytest.approx(value.item(), rel=1e-5) and torch.allclose(student.grad, with_others)


@pytest.mark.parametrize("classes", [2, 4])
def test_certain_answers_stay_finite(classes):
    # p_target = 1 in float32: the others' probabilities are 0, their logits are still there.
    student = torch.zeros(2, classes)
    student[0, 0], student[1, 1] = 300.0, -300.0
    student.requires_grad_()
    teacher = torch.zeros(2, classes)
    teacher[:, 0] = 300.0
    value = decoupled(student, teacher, torch.tensor([0, 0]), 1.0)
    value.backward()
    assert math.isfinite(value.item()) and torch.isfinite(student.grad).all()
