"""KD: labels and teacher at one head."""

import pytest

from cdl_edge.train.distill import DISTILLERS

CLS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]
TEACHER, LABELS = [[3.0, -1.0, 0.0], [0.0, 1.0, 2.0]], [0, 2]


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 2.0), (0.2, 4.0)])
def test_kd(plain, spec, distill_batch, alpha, tau):
    got = DISTILLERS["kd"](spec(alpha=alpha, tau=tau)).loss(distill_batch(CLS, LABELS, said=TEACHER)).item()
    assert got == pytest.approx(plain.kd(CLS, TEACHER, LABELS, alpha, tau), rel=1e-5)


def test_alpha_decides_who_is_heard(plain, spec, distill_batch):
    made = distill_batch(CLS, LABELS, said=TEACHER)
    labels_only, teacher_only = (DISTILLERS["kd"](spec(alpha=a)).loss(made).item() for a in (0.0, 1.0))
    assert labels_only == pytest.approx(plain.cross_entropy(CLS, LABELS), rel=1e-5)
    assert teacher_only == pytest.approx(plain.kl(CLS, TEACHER, 2.0), rel=1e-5)
