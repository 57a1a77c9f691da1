"""What all distillers share: the divergence, tokens of another grid, and what no loss may do."""

import itertools
import math

import numpy as np
import pytest
import torch

from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.distill.base import divergence, regrid
from cdl_edge.train.learners import LEARNERS
from cdl_edge.train.student import ModelSpec, PromptedViT

CLS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]
TEACHER = [[3.0, -1.0, 0.0], [0.0, 1.0, 2.0]]


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
def test_divergence(plain, tau):
    got = divergence(torch.tensor(CLS), torch.tensor(TEACHER), tau).item()
    assert got == pytest.approx(plain.kl(CLS, TEACHER, tau), rel=1e-5)
    assert divergence(torch.tensor(CLS), torch.tensor(CLS), tau).item() == pytest.approx(0, abs=1e-6)


# -- regrid -----------------------------------------------------------------------------------------------------------


def grid_of(count, seed=0):
    return torch.randn(2, 1 + count * count, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("own", "wanted"), [(4, 2), (6, 3), (5, 2), (3, 1)])
def test_a_finer_grid_is_averaged(own, wanted):
    x = grid_of(own).double()
    got = regrid(x, wanted)
    assert got.shape == (2, 1 + wanted * wanted, 3) and torch.equal(got[:, 0], x[:, 0])
    maps = x[:, 1:].reshape(2, own, own, 3)
    for row, column in itertools.product(range(wanted), repeat=2):
        # The cells that the larger one touches: they overlap where the sides do not divide.
        rows, columns = (slice(own * i // wanted, -(-own * (i + 1) // wanted)) for i in (row, column))
        expected = maps[:, rows, columns].reshape(2, -1, 3).mean(dim=1)
        assert torch.allclose(got[:, 1 + row * wanted + column], expected)


@pytest.mark.parametrize(("own", "wanted"), [(2, 4), (1, 3), (3, 7)])
def test_a_coarser_grid_is_interpolated(own, wanted):
    x = grid_of(own).double()
    got = regrid(x, wanted)
    assert got.shape == (2, 1 + wanted * wanted, 3) and torch.equal(got[:, 0], x[:, 0])
    maps = x[:, 1:].reshape(2, own, own, 3).numpy()

    def places(i):
        at = min(max((i + 0.5) * own / wanted - 0.5, 0), own - 1)
        low = math.floor(at)
        return [(low, 1 - (at - low)), (min(low + 1, own - 1), at - low)]

    for row, column in itertools.product(range(wanted), repeat=2):
        expected = sum(a * b * maps[:, i, j] for i, a in places(row) for j, b in places(column))
        assert np.allclose(got[:, 1 + row * wanted + column].numpy(), expected)


def test_the_same_grid_is_left_alone():
    x = grid_of(3)
    assert regrid(x, 3) is x


# -- every distiller --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tiny_vit):
    """A teacher of nine classes that has learnt a task and wants no query."""
    model = PromptedViT(load_backbone(tiny_vit("teacher", 24)).model, ModelSpec("apt", 9, 3, 1))
    model.learner.begin_task(0)
    model.learner.end_task(0)
    return model.requires_grad_(False)


@pytest.fixture
def scene(distill_batch, tokens, wide):
    """scene(batch, class_range, seed): a distill_batch with everything that any distiller asks for."""

    def make(batch=8, class_range=(0, 4), seed=0, rows=slice(None)):
        generator = torch.Generator().manual_seed(seed)
        cls, kd, said = torch.randn(3, batch, 9, generator=generator)
        labels = torch.arange(batch) % (class_range[1] - class_range[0])
        given = (t[rows] for t in tokens(batch, 6, 16, seed=seed))
        wanted = (t[rows] for t in tokens(batch, 6, 24, seed=seed + 1))
        return distill_batch(
            cls[rows].requires_grad_(),
            labels[rows],
            kd[rows],
            said[rows, slice(*class_range)],
            class_range,
            given,
            wanted,
            wide,
        )

    return make


def test_what_each_needs():
    needs = {n: (d.needs_teacher, d.kd_token, d.kd_rows, d.needs_hidden, d.needs_tail) for n, d in DISTILLERS.items()}
    plain_one = (True, False, False, False, False)
    assert needs == {
        "none": (False, False, False, False, False),
        "kd": plain_one,
        "dkd": plain_one,
        "fitnets": (True, False, False, True, False),
        "reviewkd": (True, False, False, True, False),
        "two-heads": (False, True, False, False, False),
        "kd-token": (True, True, False, False, False),
        "kdp": (True, True, True, False, False),
        "cdl-prompt": plain_one,
        "blockwise": (True, False, False, True, True),
        "m2kd": (False, False, False, True, False),
    }
    assert {n: d.tau for n, d in DISTILLERS.items()} == {n: 4.0 if n == "dkd" else 2.0 for n in DISTILLERS}
    assert all((not d.refusal) == all(map(d.works_with, LEARNERS.values())) for d in DISTILLERS.values())


@pytest.mark.parametrize("name", DISTILLERS)
def test_the_loss_is_a_mean_over_the_batch(name, spec, scene):
    # Trap 3: elsewhere losses scale with the number of GPUs.
    distiller = DISTILLERS[name](spec())
    whole = distiller.loss(scene()).item()
    parts = [distiller.loss(scene(rows=slice(i, None, 2))).item() for i in (0, 1)]
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)


@pytest.mark.parametrize("name", DISTILLERS)
@pytest.mark.parametrize("classes", [1, 2])
def test_a_task_of_one_class_and_of_two_is_defined(name, classes, spec, scene):
    made = scene(class_range=(0, classes))
    value = DISTILLERS[name](spec()).loss(made)
    value.backward()
    assert math.isfinite(value.item()) and torch.isfinite(made.student.cls_logits.grad).all()


# Not those that make logits of their own, which cannot be masked from outside: stepping stones, an auxiliary head.
@pytest.mark.parametrize("name", [n for n, d in DISTILLERS.items() if not d.needs_tail and n != "m2kd"])
def test_only_current_classes_is_the_same_as_minus_infinity_elsewhere(name, spec, distill_batch, tokens):
    # The papers set the logits of other classes to -inf; here the columns are cut out.
    generator = torch.Generator().manual_seed(1)
    cls, kd, said = torch.randn(3, 6, 9, generator=generator)
    labels = torch.randint(3, 6, (6,), generator=generator)

    def masked(x):
        y = torch.full_like(x, -1e9)
        y[:, 3:6] = x[:, 3:6]
        return y

    hidden, wanted = tokens(6, 6, 16), tokens(6, 6, 24, seed=1)
    distiller = DISTILLERS[name](spec())
    cut = distiller.loss(distill_batch(cls, labels - 3, kd, said[:, 3:6], (3, 6), hidden, wanted)).item()
    whole = distill_batch(masked(cls), labels, masked(kd), masked(said), (0, 9), hidden, wanted)
    assert distiller.loss(whole).item() == pytest.approx(cut, rel=1e-5)


@pytest.mark.parametrize("name", DISTILLERS)
def test_no_gradient_reaches_the_head_of_another_task(name, spec, scene):
    made = scene(class_range=(3, 6))
    DISTILLERS[name](spec()).loss(made).backward()
    gradient = made.student.cls_logits.grad.abs().sum(dim=0)
    assert (gradient[3:6] > 0).all() and gradient[:3].max() == 0 and gradient[6:].max() == 0


@pytest.mark.parametrize("name", DISTILLERS)
def test_initial_values_come_from_the_seed_alone(name, spec):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = DISTILLERS[name](spec())
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    two, other = DISTILLERS[name](spec()), DISTILLERS[name](spec(seed=1))
    for (key, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), key
    if list(one.parameters()):
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", DISTILLERS)
def test_everything_a_distiller_learns_gets_a_gradient(name, spec, scene):
    distiller = DISTILLERS[name](spec())
    distiller.loss(scene()).backward()
    for key, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
