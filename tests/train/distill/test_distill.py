"""The losses against numbers worked out by hand, and what each distiller asks for."""

import math

import pytest
import torch

from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.distill.base import divergence

CLS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]
KD = [[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]]
TEACHER = [[3.0, -1.0, 0.0], [0.0, 1.0, 2.0]]
LABELS = [0, 2]


def softmax(row, tau=1.0):
    e = [math.exp(v / tau) for v in row]
    return [v / sum(e) for v in e]


def cross_entropy(rows, labels):
    return sum(-math.log(softmax(r)[y]) for r, y in zip(rows, labels, strict=True)) / len(rows)


def kl(student, teacher, tau):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(t, tau), softmax(s, tau)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return tau * tau * total / len(student)


def loss(name, alpha=0.5, tau=2.0, kd=KD, teacher=TEACHER):
    tensors = [None if v is None else torch.tensor(v) for v in (CLS, kd, teacher)]
    return DISTILLERS[name](alpha, tau).loss(*tensors, torch.tensor(LABELS)).item()


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
def test_divergence(tau):
    got = divergence(torch.tensor(CLS), torch.tensor(TEACHER), tau).item()
    assert got == pytest.approx(kl(CLS, TEACHER, tau), rel=1e-5)
    assert divergence(torch.tensor(CLS), torch.tensor(CLS), tau).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 2.0), (0.2, 4.0)])
def test_kdp(alpha, tau):
    expected = (1 - alpha) * cross_entropy(CLS, LABELS) + alpha * kl(KD, TEACHER, tau)
    assert loss("kdp", alpha, tau) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 2.0), (0.2, 4.0)])
def test_kd(alpha, tau):
    expected = (1 - alpha) * cross_entropy(CLS, LABELS) + alpha * kl(CLS, TEACHER, tau)
    assert loss("kd", alpha, tau, kd=None) == pytest.approx(expected, rel=1e-5)


def test_none():
    assert loss("none", kd=None, teacher=None) == pytest.approx(cross_entropy(CLS, LABELS), rel=1e-5)


def test_what_each_needs():
    assert {n: d.needs_teacher for n, d in DISTILLERS.items()} == {"none": False, "kd": True, "kdp": True}
    assert {n: d.kd_prompts for n, d in DISTILLERS.items()} == {"none": False, "kd": False, "kdp": True}


def test_kdp_teaches_each_head_its_own():
    cls, kd = torch.tensor(CLS, requires_grad=True), torch.tensor(KD, requires_grad=True)
    DISTILLERS["kdp"](0.5, 2.0).loss(cls, kd, torch.tensor(TEACHER), torch.tensor(LABELS)).backward()
    hard = torch.tensor(CLS, requires_grad=True)
    (0.5 * torch.nn.functional.cross_entropy(hard, torch.tensor(LABELS))).backward()
    assert torch.allclose(cls.grad, hard.grad)  # no word of the teacher reaches the class token's head
    assert kd.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DISTILLERS)
def test_the_loss_is_a_mean_over_the_batch(name):
    generator = torch.Generator().manual_seed(0)
    cls, kd, teacher = torch.randn(3, 8, 4, generator=generator)
    labels = torch.arange(8) % 4
    distiller = DISTILLERS[name](0.5, 2.0)
    whole = distiller.loss(cls, kd, teacher, labels).item()
    parts = [distiller.loss(cls[i::2], kd[i::2], teacher[i::2], labels[i::2]).item() for i in (0, 1)]
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_task_of_one_class_and_of_two_is_defined(name):
    for classes in (1, 2):
        rows = torch.randn(3, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
        value = DISTILLERS[name](0.5, 2.0).loss(rows, rows + 1, rows.detach() * 2, torch.zeros(3, dtype=torch.int64))
        value.backward()
        assert math.isfinite(value.item()) and torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("name", DISTILLERS)
def test_only_current_classes_is_the_same_as_minus_infinity_elsewhere(name):
    # The papers set the logits of other classes to -inf; the loop cuts the columns out.
    generator = torch.Generator().manual_seed(1)
    cls, kd, teacher = torch.randn(3, 6, 9, generator=generator)
    labels = torch.randint(3, 6, (6,), generator=generator)

    def masked(x):
        y = torch.full_like(x, -1e9)
        y[:, 3:6] = x[:, 3:6]
        return y

    distiller = DISTILLERS[name](0.5, 2.0)
    cut = distiller.loss(cls[:, 3:6], kd[:, 3:6], teacher[:, 3:6], labels - 3)
    assert distiller.loss(masked(cls), masked(kd), masked(teacher), labels).item() == pytest.approx(
        cut.item(), rel=1e-5
    )
