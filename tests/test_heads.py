"""Heads from class statistics against the formulas of their papers, written here from the images themselves."""

import numpy as np
import pytest

from cdl_edge import heads
from cdl_edge.class_statistics import ClassStatistics, merged
from cdl_edge.heads import CLOSED_FORM, feature_map

WIDTH, CLASSES, FEATURES = 12, 5, 64
NAMES = [f"class {c}" for c in range(CLASSES)]
kinds = pytest.mark.parametrize("head", list(CLOSED_FORM))


def images(count=40, seed=0, scale=1.0):
    """Features (N, WIDTH) that do not have mean 0, with correlated channels, and labels; classes of unlike sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((WIDTH, WIDTH))
    centres = 1.5 * rng.standard_normal((CLASSES, WIDTH)) + 2
    labels = np.concatenate([np.full(count + 3 * c, c) for c in range(CLASSES)])
    x = centres[labels] + rng.standard_normal((len(labels), WIDTH)) @ mixing
    return (scale * x).astype(np.float32), labels


def statistics(head, x, labels):
    return ClassStatistics.of(feature_map(head, ("class",), WIDTH, FEATURES), x, labels, NAMES)


# -- the formulas ------------------------------------------------------------------------------------------------------


def ncm_by_hand(x, labels):
    """Cosine to the mean of the normalised features of a class; times a constant."""
    unit = x / np.sqrt((x**2).sum(axis=1))[:, None]
    means = np.stack([unit[labels == c].mean(axis=0) for c in range(CLASSES)])
    cosines = [[u @ m / np.sqrt(m @ m) for m in means] for u in unit]
    return heads.COSINE_SCALE * np.array(cosines)


def slda_by_hand(x, labels):
    """x^T S^-1 m - m^T S^-1 m / 2 with S shrunk towards a multiple of the identity (Chen et al. 2010, eq. 23)."""
    means = np.stack([x[labels == c].mean(axis=0) for c in range(CLASSES)])
    centred = x - means[labels]
    n, p = centred.shape
    s = sum(np.outer(row, row) for row in centred) / n
    t, t2 = np.trace(s), np.trace(s @ s)
    rho = min(1.0, ((1 - 2 / p) * t2 + t**2) / ((n + 1 - 2 / p) * (t2 - t**2 / p)))
    inverse = np.linalg.inv((1 - rho) * s + rho * t / p * np.eye(p))
    logits = np.array([[row @ inverse @ m - m @ inverse @ m / 2 for m in means] for row in x])
    own = np.array([[c @ inverse @ m - m @ inverse @ m / 2 for m in means] for c in means])
    gap = np.mean([own[i, i] - own[i].mean() for i in range(CLASSES)])
    return logits * min(1.0, heads.GAP / gap), rho


def ranpac_by_hand(x, labels):
    """Ridge regression on relu(x R); the ridge with the least generalised cross-validation error, from residuals."""
    projection = np.random.default_rng([0, 0x4A9]).standard_normal((WIDTH, FEATURES), np.float32)
    h = np.maximum(x @ projection.astype(np.float64), 0)
    y = np.eye(CLASSES)[labels]
    n, level = len(x), np.trace(h.T @ h) / h.shape[1]
    found = []
    for exponent in np.arange(-7, 2.1, 0.5):
        ridge = 10.0**exponent * level
        inverse = np.linalg.inv(h.T @ h + ridge * np.eye(h.shape[1]))
        hat = h @ inverse @ h.T
        residuals = y - hat @ y
        found.append(((residuals**2).sum() / n / (1 - np.trace(hat) / n) ** 2, ridge, h @ inverse @ h.T @ y))
    _, ridge, logits = min(found, key=lambda f: f[0])
    return heads.RIDGE_SCALE * logits, ridge


def answers(head, x, labels, made):
    return feature_map(head, ("class",), WIDTH, FEATURES).apply(x) @ made.weight.T + made.bias


@pytest.mark.parametrize("seed", range(3))
def test_ncm(seed):
    x, labels = images(seed=seed)
    made = heads.ncm(statistics("ncm", x, labels))
    assert np.abs(answers("ncm", x, labels, made) - ncm_by_hand(x.astype(np.float64), labels)).max() < 1e-6


@pytest.mark.parametrize(("count", "seed"), [(40, 0), (40, 1), (2, 0), (400, 0)])
def test_slda_with_its_shrinkage(count, seed):
    x, labels = images(count, seed)
    made = heads.slda(statistics("slda", x, labels))
    expected, share = slda_by_hand(x.astype(np.float64), labels)
    assert abs(made.chosen - share) < 1e-6
    got = answers("slda", x, labels, made)
    # Ours lacks what all classes have in common: a softmax does not see it.
    for logits in (got, expected):
        logits -= logits.mean(axis=1, keepdims=True)
    assert np.abs(got - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("count", "seed"), [(40, 0), (40, 1), (15, 0), (150, 0)])
def test_ranpac_with_its_ridge(count, seed):
    x, labels = images(count, seed)
    made = heads.ranpac(statistics("ranpac", x, labels))
    expected, ridge = ranpac_by_hand(x.astype(np.float64), labels)
    assert made.chosen == pytest.approx(ridge, rel=1e-6)
    assert np.abs(answers("ranpac", x, labels, made) - expected).max() < 1e-6


# -- order, subtraction ------------------------------------------------------------------------------------------------


def in_tasks(head, x, labels, order):
    """One class a task, in an order."""
    maps = feature_map(head, ("class",), WIDTH, FEATURES)
    parts = [ClassStatistics.of(maps, x[labels == c], np.zeros((labels == c).sum(), int), [NAMES[c]]) for c in order]
    return merged(parts)


def same_head(head, a, b):
    make = CLOSED_FORM[head][1]
    one, two = make(a), make(b.ordered(a.classes))
    assert one.chosen == pytest.approx(two.chosen, rel=1e-6)
    for mine, theirs in ((one.weight, two.weight), (one.bias, two.bias)):
        assert np.abs(mine - theirs).max() <= 1e-6 * max(1.0, np.abs(theirs).max())


@kinds
def test_the_order_of_tasks_does_not_change_a_head(head):
    x, labels = images()
    at_once = statistics(head, x, labels)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        same_head(head, at_once, in_tasks(head, x, labels, order))


@kinds
def test_a_task_that_is_taken_out_and_learnt_again(head):
    x, labels = images()
    never = in_tasks(head, x, labels, range(CLASSES))
    part = in_tasks(head, x, labels, [1, 3])
    same_head(head, never, (never - part) + part)
    same_head(head, in_tasks(head, x, labels, [0, 2, 4]), never - part)


@kinds
def test_it_knows_the_classes(head):
    x, labels = images()
    made = CLOSED_FORM[head][1](statistics(head, x, labels))
    right = (answers(head, x, labels, made).argmax(axis=1) == labels).mean()
    assert right > 0.6 and made.weight.dtype == made.bias.dtype == np.float64


# -- little or odd data ------------------------------------------------------------------------------------------------


@kinds
def test_one_image_a_class(head):
    x = images(1)[0][:CLASSES].copy()
    made = CLOSED_FORM[head][1](statistics(head, x, np.arange(CLASSES)))
    assert np.isfinite(made.weight).all() and np.isfinite(made.bias).all()
    assert (answers(head, x, np.arange(CLASSES), made).argmax(axis=1) == np.arange(CLASSES)).all()


@kinds
def test_one_class(head):
    x = images()[0][:20]
    parts = ClassStatistics.of(feature_map(head, ("class",), WIDTH, FEATURES), x, np.zeros(20, int), ["only"])
    made = CLOSED_FORM[head][1](parts)
    assert made.weight.shape[0] == 1 and np.isfinite(made.weight).all() and np.isfinite(made.bias).all()


@kinds
def test_features_that_are_all_the_same(head):
    x = np.zeros((10, WIDTH), np.float32)
    made = CLOSED_FORM[head][1](statistics(head, x, np.arange(10) % CLASSES))
    assert np.isfinite(made.weight).all() and np.isfinite(made.bias).all()


@kinds
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_answers_do_not_depend_on_the_scale_of_features(head, scale):
    found = []
    for factor in (1.0, scale):
        x, labels = images(scale=factor)
        made = CLOSED_FORM[head][1](statistics(head, x, labels))
        found.append(answers(head, x, labels, made))
    # Features are float32: scaling rounds them.
    assert np.abs(found[0] - found[1]).max() < 1e-3 * np.abs(found[0]).max()
