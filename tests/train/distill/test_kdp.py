"""KDP and the KD token alone: one loss, two heads, and the rows that make the difference."""

import pytest
import torch

from cdl_edge.train.config import TrainConfig
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.run import build_model
from cdl_edge.train.student import LinearHead, NormalisedHead

CLS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]
KD = [[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]]
TEACHER, LABELS = [[3.0, -1.0, 0.0], [0.0, 1.0, 2.0]], [0, 2]


@pytest.mark.parametrize("name", ["kdp", "kd-token"])
@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 2.0), (0.2, 4.0)])
def test_kdp(plain, spec, distill_batch, name, alpha, tau):
    expected = (1 - alpha) * plain.cross_entropy(CLS, LABELS) + alpha * plain.kl(KD, TEACHER, tau)
    got = DISTILLERS[name](spec(alpha=alpha, tau=tau)).loss(distill_batch(CLS, LABELS, KD, TEACHER)).item()
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["kdp", "kd-token"])
def test_each_head_is_taught_its_own(spec, distill_batch, name):
    cls, kd = torch.tensor(CLS, requires_grad=True), torch.tensor(KD, requires_grad=True)
    DISTILLERS[name](spec()).loss(distill_batch(cls, LABELS, kd, TEACHER)).backward()
    hard = torch.tensor(CLS, requires_grad=True)
    (0.5 * torch.nn.functional.cross_entropy(hard, torch.tensor(LABELS))).backward()
    assert torch.allclose(cls.grad, hard.grad)  # no word of the teacher reaches the class token's head
    assert kd.grad.abs().sum() > 0


@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda", "apt"])
def test_the_token_alone_has_no_rows(backbone, learner):
    for name, rows in (("kdp", (5, 6, 16)), ("kd-token", (0, 0, 16))):
        config = TrainConfig("digits", "x", learner=learner, distill=name)
        student = build_model(config, backbone, 10, backbone.width, is_student=True)
        assert student.kd.token.shape == (1, 1, 16) and student.kd.rows.shape == rows
        assert student.kd_head is not None
        assert [student.kd.at_block(i) is not None for i in range(6)] == [False, *[name == "kdp"] * 5]
        teacher = build_model(config, backbone, 10, backbone.width, is_student=False)
        assert teacher.kd is None and teacher.kd_head is None


@pytest.mark.parametrize("name", ["kdp", "kd-token"])
def test_the_kind_of_the_kd_head(backbone, name):
    config = TrainConfig("digits", "x", learner="dualprompt", distill=name, kd_head="normalised")
    student, teacher = (build_model(config, backbone, 10, 16, is_student=side) for side in (True, False))
    assert (type(student.head), type(student.kd_head)) == (LinearHead, NormalisedHead)
    assert (type(teacher.head), teacher.kd_head) == (LinearHead, None)
    # As with the other options of KD prompts: who has no KD token has no use for it.
    plain = TrainConfig("digits", "x", learner="dualprompt", distill="kd", kd_head="normalised")
    assert build_model(plain, backbone, 10, 16, is_student=True).kd_head is None


def test_the_token_alone_is_kdp_without_its_rows(backbone):
    # The same seed: what both have starts from the same numbers.
    kdp, token = (
        build_model(TrainConfig("digits", "x", distill=n), backbone, 10, 16, is_student=True)
        for n in ("kdp", "kd-token")
    )
    states = kdp.state_dict(), token.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items() if k != "kd.rows")
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(kdp(tokens).cls_logits, token(tokens).cls_logits)
        # Rows reach the class token; the token itself does too, from block 0 on.
        kdp.kd.rows = torch.nn.Parameter(torch.zeros(0, 0, 16))
        assert torch.equal(kdp(tokens).cls_logits, token(tokens).cls_logits)
