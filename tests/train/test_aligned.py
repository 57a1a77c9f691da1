"""Classifier alignment: a linear head learnt on drawn features, no image."""

import numpy as np
import pytest
import torch

from cdl_edge.class_statistics import ClassStatistics, FeatureMap
from cdl_edge.heads import slda
from cdl_edge.train.aligned import align

WIDTH, CLASSES = 6, 4


def drawn(counts, seed=0, width=WIDTH):
    """Statistics of Gaussians, and 400 images a class that are not among them."""
    rng = np.random.default_rng(seed)
    centres, mixing = 2 * rng.standard_normal((len(counts), width)), rng.standard_normal((width, width))

    def images(numbers):
        labels = np.repeat(np.arange(len(numbers)), numbers)
        return centres[labels] + rng.standard_normal((len(labels), width)) @ mixing, labels

    map = FeatureMap(("class",), width)
    names = [str(c) for c in range(len(counts))]
    return ClassStatistics.of(map, *images(counts), names), images([400] * len(counts))


def accuracy(head, images):
    x, labels = images
    return float(((x @ head.weight.T + head.bias).argmax(axis=1) == labels).mean())


def test_it_is_as_good_as_the_best_of_equal_covariances():
    held, unseen = drawn([300] * CLASSES)
    # Of Gaussians with one covariance, discriminant analysis is the Bayes rule: nothing can be better by much.
    assert accuracy(align(held, 0), unseen) > accuracy(slda(held), unseen) - 0.02


def test_it_learns_from_every_class_alike():
    held, unseen = drawn([1000, 30, 30, 30])
    assert accuracy(align(held, 0), unseen) > accuracy(slda(held), unseen) - 0.03


def test_it_has_a_lower_loss_than_it_started_with():
    held, unseen = drawn([12] * CLASSES, width=10)

    def loss(head):
        logits = torch.from_numpy(unseen[0] @ head.weight.T + head.bias)
        return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(unseen[1])))

    start, end = slda(held), align(held, 0)
    assert not np.allclose(start.weight, end.weight) and loss(end) < 1.1 * loss(start)


def test_the_same_seed_draws_the_same():
    held, _ = drawn([20] * CLASSES)
    state = torch.random.get_rng_state()
    one, same, other = (align(held, seed) for seed in (0, 0, 1))
    assert np.array_equal(one.weight, same.weight) and np.array_equal(one.bias, same.bias)
    assert not np.array_equal(one.weight, other.weight)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's numbers are used up


@pytest.mark.parametrize("counts", [[1, 1, 1], [5]], ids=["one image a class", "one class"])
def test_little_data(counts):
    held, _ = drawn(counts)
    made = align(held, 0)
    assert made.weight.shape == (len(counts), WIDTH) and np.isfinite(made.weight).all() and np.isfinite(made.bias).all()


def test_it_learns_where_nothing_else_does():
    """What measures a run at its end computes no gradients."""
    held, _ = drawn([20] * CLASSES)
    with torch.no_grad():
        found = align(held, 0)
    assert np.array_equal(found.weight, align(held, 0).weight)
