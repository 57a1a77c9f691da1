"""The control: the student of kd-token, both heads taught by the labels, no teacher."""

import pytest
import torch

from cdl_edge.train.config import TrainConfig
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.loop import train
from cdl_edge.train.run import build_model, load_run

CLS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]
KD = [[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]]
LABELS = [0, 2]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_both_heads_learn_from_the_labels(plain, spec, distill_batch, alpha):
    expected = (1 - alpha) * plain.cross_entropy(CLS, LABELS) + alpha * plain.cross_entropy(KD, LABELS)
    got = DISTILLERS["two-heads"](spec(alpha=alpha)).loss(distill_batch(CLS, LABELS, KD)).item()
    assert got == pytest.approx(expected, rel=1e-5)


def test_only_the_current_classes_are_compared(spec, distill_batch):
    cls, kd = (torch.tensor(rows, requires_grad=True) for rows in (CLS, KD))
    DISTILLERS["two-heads"](spec()).loss(distill_batch(cls, [0, 1], kd, class_range=(1, 3))).backward()
    for logits in (cls, kd):
        assert (logits.grad[:, 0] == 0).all() and (logits.grad[:, 1:] != 0).all()


@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda", "apt"])
def test_it_is_kd_tokens_student_to_the_last_number(backbone, learner):
    one, two = (
        build_model(TrainConfig("digits", "x", learner=learner, distill=d), backbone, 10, 16, is_student=True)
        for d in ("two-heads", "kd-token")
    )
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.slow
def test_a_run_trains_no_teacher_and_mixes_both_heads(tmp_path, make_config):
    metrics = train(make_config(tmp_path / "run", learner="apt", distill="two-heads", alpha=0.25), quiet=True)
    assert metrics["teacher"] is None and "teacher" not in metrics["backbones"]
    student = load_run(tmp_path / "run").student
    output = student(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(student.combine(output), 0.75 * output.cls_logits + 0.25 * output.kd_logits)
