"""Without distillation: cross entropy, whatever alpha is."""

import pytest

from cdl_edge.train.distill import DISTILLERS

CLS, LABELS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]], [0, 2]


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_none(plain, spec, distill_batch, alpha):
    got = DISTILLERS["none"](spec(alpha=alpha)).loss(distill_batch(CLS, LABELS)).item()
    assert got == pytest.approx(plain.cross_entropy(CLS, LABELS), rel=1e-5)
