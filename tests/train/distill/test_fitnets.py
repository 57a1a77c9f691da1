"""FitNets: KD and the last tokens, also of a teacher with another grid."""

import numpy as np
import pytest
import torch

from cdl_edge.train.distill import DISTILLERS

CLS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]
TEACHER, LABELS = [[3.0, -1.0, 0.0], [0.0, 1.0, 2.0]], [0, 2]


def reduced(wanted, own, grid):
    """(B, 1 + own^2, D) -> (B, 1 + grid^2, D): mean of square cells."""
    cell = own // grid
    rows = [wanted[:, 0]]
    for i in range(grid):
        for j in range(grid):
            at = [1 + (i * cell + a) * own + j * cell + b for a in range(cell) for b in range(cell)]
            rows.append(sum(wanted[:, k] for k in at) / len(at))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("teacher_grid", [2, 4, 6])
@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 2.0), (0.2, 4.0)])
def test_fitnets(plain, spec, distill_batch, tokens, alpha, tau, teacher_grid):
    distiller = DISTILLERS["fitnets"](spec(alpha=alpha, tau=tau, teacher_grid=teacher_grid))
    hidden, wanted = tokens(2, 6, 16), tokens(2, 6, 24, teacher_grid, seed=1)
    weight, bias = (p.detach().double().numpy() for p in distiller.regressor.parameters())
    given = np.stack([[weight @ token + bias for token in image] for image in hidden[-1].double().numpy()])
    features = np.mean((given - reduced(wanted[-1].double().numpy(), teacher_grid, 2)) ** 2)
    expected = plain.kd(CLS, TEACHER, LABELS, alpha, tau) + 0.1 * features
    got = distiller.loss(distill_batch(CLS, LABELS, said=TEACHER, hidden=hidden, teacher_hidden=wanted)).item()
    assert got == pytest.approx(expected, rel=1e-5)


def test_only_the_last_tokens_count(spec, distill_batch, tokens):
    distiller = DISTILLERS["fitnets"](spec())
    hidden, wanted = list(tokens(2, 6, 16)), list(tokens(2, 6, 24, seed=1))
    hidden[-1].requires_grad_()
    before = distiller.loss(distill_batch(CLS, LABELS, said=TEACHER, hidden=hidden, teacher_hidden=wanted))
    before.backward()
    assert (hidden[-1].grad.abs().sum(dim=2) > 0).all()  # every token, not the class token only
    hidden[:-1] = [h * 0 for h in hidden[:-1]]
    wanted[:-1] = [h * 0 for h in wanted[:-1]]
    after = distiller.loss(distill_batch(CLS, LABELS, said=TEACHER, hidden=hidden, teacher_hidden=wanted))
    assert torch.equal(before, after)


def test_the_authors_feature_term_is_that_of_two_gpus(plain, spec, distill_batch, tokens):
    hidden, wanted = tokens(2, 6, 16), tokens(2, 6, 24, seed=1)
    told = distill_batch(CLS, LABELS, said=TEACHER, hidden=hidden, teacher_hidden=wanted)
    ours, theirs = (DISTILLERS["fitnets"](spec(compat=c)).loss(told).item() for c in (False, True))
    kd = plain.kd(CLS, TEACHER, LABELS, 0.5, 2.0)
    assert theirs - kd == pytest.approx(2 * (ours - kd), rel=1e-4)
