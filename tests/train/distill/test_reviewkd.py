"""ReviewKD: fusions from the last block to the first, the hierarchical loss, and pairs of any depth and grid."""

import math

import numpy as np
import pytest
import torch

from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.distill.reviewkd import hierarchical, partner

CLS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]
TEACHER, LABELS = [[3.0, -1.0, 0.0], [0.0, 1.0, 2.0]], [0, 2]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (12, 24, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]),
        (6, 24, [3, 7, 11, 15, 19, 23]),
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (12, 6, [0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5]),
        (4, 6, [1, 2, 3, 5]),
        (3, 1, [0, 0, 0]),
    ],
)
def test_blocks_meet_at_the_same_share_of_the_depth(student, teacher, expected):
    assert [partner(i, student, teacher) for i in range(student)] == expected


def pooled(maps, cells):
    """(B, G, G, D) -> (B, cells, cells, D), every cell the mean of the patches it touches."""
    side = maps.shape[1]
    edges = [(side * i // cells, -(-side * (i + 1) // cells)) for i in range(cells)]
    return np.array([[maps[:, a:b, c:d].mean(axis=(1, 2)) for c, d in edges] for a, b in edges]).transpose(2, 0, 1, 3)


def hcl(given, wanted):
    """(B, 1 + P, D) both, double."""
    side = round((given.shape[1] - 1) ** 0.5)
    total, weights = np.mean((given - wanted) ** 2), [1.0]
    one, two = (x[:, 1:].reshape(len(x), side, side, -1) for x in (given, wanted))
    for cells in (4, 2, 1):
        if cells < side:
            weights.append(weights[-1] / 2)
            total += weights[-1] * np.mean((pooled(one, cells) - pooled(two, cells)) ** 2)
    return total / sum(weights)


@pytest.mark.parametrize(("grid", "levels"), [(1, 1), (2, 2), (4, 3), (6, 4), (7, 4)])
def test_the_hierarchical_loss(tokens, grid, levels):
    given, wanted = (tokens(2, 1, 5, grid, seed)[0].double() for seed in (0, 1))
    assert hierarchical(given, wanted).item() == pytest.approx(hcl(given.numpy(), wanted.numpy()), rel=1e-6)
    # A constant difference of the patches is seen on every level.
    constant = given.clone()
    constant[:, 1:] += 1
    expected = (grid * grid / (1 + grid * grid) + sum(0.5**i for i in range(1, levels))) / sum(
        0.5**i for i in range(levels)
    )
    assert hierarchical(constant, given).item() == pytest.approx(expected, rel=1e-6)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(distiller, hidden, wanted, depths):
    """Mean HCL over the student's blocks, token by token."""
    total, deeper = 0.0, None
    for i in reversed(range(depths[0])):
        w = {k: v.detach().double().numpy() for k, v in distiller.fusions[i].state_dict().items()}
        x = hidden[i].double().numpy() @ w["enter.weight"].T + w["enter.bias"]
        if deeper is None:
            assert "gates.weight" not in w
        else:
            mixed = np.zeros_like(x)
            for b in range(x.shape[0]):
                for n in range(x.shape[1]):
                    gates = w["gates.weight"] @ np.concatenate([x[b, n], deeper[b, n]]) + w["gates.bias"]
                    mixed[b, n] = sigmoid(gates[0]) * x[b, n] + sigmoid(gates[1]) * deeper[b, n]
            x = mixed
        deeper = x
        given = x @ w["leave.weight"].T + w["leave.bias"]
        total += hcl(given, wanted[partner(i, *depths)].double().numpy())
    return total / depths[0]


@pytest.mark.parametrize("depths", [(6, 6), (12, 24), (6, 24), (4, 6), (12, 6)])
def test_reviewkd(plain, spec, distill_batch, tokens, depths):
    distiller = DISTILLERS["reviewkd"](spec(alpha=0.2, tau=4.0, student_depth=depths[0], teacher_depth=depths[1]))
    hidden, wanted = tokens(2, depths[0], 16), tokens(2, depths[1], 24, seed=1)
    expected = plain.kd(CLS, TEACHER, LABELS, 0.2, 4.0) + 0.2 * by_hand(distiller, hidden, wanted, depths)
    got = distiller.loss(distill_batch(CLS, LABELS, said=TEACHER, hidden=hidden, teacher_hidden=wanted)).item()
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_teacher_of_another_grid(plain, spec, distill_batch, tokens):
    distiller = DISTILLERS["reviewkd"](spec(teacher_grid=6, student_grid=3))
    hidden, wanted = tokens(2, 6, 16, 3), tokens(2, 6, 24, 6, seed=1)
    halved = []
    for block in wanted:
        maps = block[:, 1:].reshape(2, 3, 2, 3, 2, 24).mean(dim=(2, 4))
        halved.append(torch.cat([block[:, :1], maps.reshape(2, 9, 24)], dim=1))
    expected = plain.kd(CLS, TEACHER, LABELS, 0.5, 2.0) + 0.2 * by_hand(distiller, hidden, halved, (6, 6))
    got = distiller.loss(distill_batch(CLS, LABELS, said=TEACHER, hidden=hidden, teacher_hidden=wanted)).item()
    assert got == pytest.approx(expected, rel=1e-5)


def test_what_a_deep_block_says_reaches_the_shallow_ones(spec, distill_batch, tokens):
    # "Knowledge review": an imitation of the first block reads all deeper student blocks.
    distiller = DISTILLERS["reviewkd"](spec())
    hidden = [h.requires_grad_() for h in tokens(2, 6, 16)]
    _, deeper = distiller.fusions[5](hidden[5], None)
    for i in reversed(range(5)):
        given, deeper = distiller.fusions[i](hidden[i], deeper)
    given.sum().backward()
    assert all(h.grad.abs().sum() > 0 for h in hidden)


def standardised(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


@pytest.mark.parametrize(("depths", "first"), [((6, 6), 0), ((6, 8), 2), ((12, 24), 12)])
def test_the_authors_reviewkd(plain, spec, distill_batch, tokens, depths, first):
    """Their fusion in numpy: LayerNorms, a factor a channel in place of the gates, squared error alone, last blocks."""
    distiller = DISTILLERS["reviewkd"](spec(student_depth=depths[0], teacher_depth=depths[1], compat=True))
    generator = torch.Generator().manual_seed(4)
    for p in distiller.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    hidden, wanted = tokens(2, depths[0], 16), tokens(2, depths[1], 24, seed=1)
    total, deeper = 0.0, None
    for i in reversed(range(depths[0])):
        w = {k: v.detach().double().numpy() for k, v in distiller.fusions[i].state_dict().items()}
        x = hidden[i].double().numpy() @ w["enter.0.weight"].T + w["enter.0.bias"]
        x = standardised(x, w["enter.1.weight"], w["enter.1.bias"])
        if deeper is None:
            assert not any(k.startswith(("factors", "mixed")) for k in w)
        else:
            parts = []
            for part in (x, deeper):
                factor = part @ w["factors.0.weight"].T + w["factors.0.bias"]
                parts.append(part * standardised(factor, w["factors.1.weight"], w["factors.1.bias"]))
            x = standardised(sum(parts), w["mixed.weight"], w["mixed.bias"])
        deeper = x
        given = x @ w["leave.weight"].T + w["leave.bias"]
        total += np.mean((given - wanted[first + i].double().numpy()) ** 2)
    expected = plain.kd(CLS, TEACHER, LABELS, 0.5, 2.0) + 2 * 0.2 * total / depths[0]
    got = distiller.loss(distill_batch(CLS, LABELS, said=TEACHER, hidden=hidden, teacher_hidden=wanted)).item()
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_teacher_of_fewer_blocks_is_met_as_ever(spec):
    distiller = DISTILLERS["reviewkd"](spec(student_depth=12, teacher_depth=6, compat=True))
    assert [distiller.partner(i) for i in range(12)] == [partner(i, 12, 6) for i in range(12)]
