"""Block-wise distillation: stepping stones built by hand out of timm's own blocks."""

import pytest
import torch
from torch import nn

from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.distill.base import divergence
from cdl_edge.train.student import ModelSpec, PromptedViT

LABELS = [0, 2, 1]
SPAN = (3, 6)


@pytest.fixture
def wide(tiny_vit):
    """wide(depth, learner): a frozen teacher of width 24 and nine classes with weights that matter."""

    def make(depth=6, learner="apt", learnt=0, width=16):
        backbone = load_backbone(tiny_vit("teacher", 24, depth))
        model = PromptedViT(backbone.model, ModelSpec(learner, 9, 3, 1, key_width=width))
        for task in range(learnt):
            model.learner.begin_task(task)
            model.learner.end_task(task)
        return model.requires_grad_(False)

    return make


@pytest.mark.parametrize(
    ("depths", "cuts"),
    [
        ((12, 12), [(3, 3), (6, 6), (9, 9)]),
        ((12, 24), [(3, 6), (6, 12), (9, 18)]),
        ((6, 6), [(2, 2), (3, 3), (4, 4)]),
        ((3, 12), [(1, 4), (2, 8)]),
        ((1, 6), []),
    ],
)
def test_groups(spec, depths, cuts):
    distiller = DISTILLERS["blockwise"](spec(student_depth=depths[0], teacher_depth=depths[1]))
    assert distiller.cuts == cuts
    assert [c.weight.shape for c in distiller.connectors] == [(24, 16)] * len(cuts)


def stones(distiller, teacher, hidden):
    """Logits of each stepping stone: the connector, timm's blocks behind the cut, norm, head."""
    found = []
    vit = teacher.backbone
    for connector, (run, skipped) in zip(distiller.connectors, distiller.cuts, strict=True):
        x = torch.stack(
            [torch.stack([connector.weight @ t + connector.bias for t in image]) for image in hidden[run - 1]]
        )
        for block in vit.blocks[skipped:]:
            x = block(x)
        found.append(teacher.head(vit.norm(x)[:, 0])[:, slice(*SPAN)])
    return found


@pytest.mark.parametrize("teacher_depth", [6, 12])
@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 2.0), (0.2, 4.0)])
def test_blockwise(plain, spec, distill_batch, tokens, wide, alpha, tau, teacher_depth):
    teacher = wide(teacher_depth)  # no task learnt: APT's merged prompt is zero, the blocks are timm's
    distiller = DISTILLERS["blockwise"](spec(alpha=alpha, tau=tau, teacher_depth=teacher_depth))
    hidden = tokens(3, 6, 16)
    generator = torch.Generator().manual_seed(2)
    cls, said = torch.randn(3, 9, generator=generator), torch.randn(3, 3, generator=generator)
    with torch.no_grad():
        answers = [s.tolist() for s in stones(distiller, teacher, hidden)]
        answers.append(cls[:, 3:6].tolist())
        assert len(answers) == 4
        mean = [[sum(a[b][c] for a in answers) / 4 for c in range(3)] for b in range(3)]
        expected = 0.0
        for answer, share in zip(answers, (1 / 8, 1 / 4, 1 / 2, 1), strict=True):
            term = (1 - alpha) * plain.cross_entropy(answer, LABELS)
            term += alpha * plain.kl(answer, said.tolist(), tau)
            term += 0.5 * alpha * plain.kl(answer, mean, tau)
            expected += share * term
        got = distiller.loss(
            distill_batch(cls, LABELS, said=said, class_range=SPAN, hidden=hidden, teacher=teacher)
        ).item()
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda", "apt"])
def test_a_stone_is_the_rest_of_the_teacher(spec, distill_batch, wide, learner):
    # A connector that does nothing, in front of tokens that are the teacher's own: each stone answers as the teacher.
    teacher = wide(learner=learner, learnt=2, width=24)
    generator = torch.Generator().manual_seed(0)
    inputs, query = torch.randn(3, 5, 24, generator=generator), torch.randn(3, 24, generator=generator)
    distiller = DISTILLERS["blockwise"](spec(student_width=24, alpha=0.0))
    for connector in distiller.connectors:
        nn.init.eye_(connector.weight)
        nn.init.zeros_(connector.bias)
    with torch.no_grad():
        whole = teacher(inputs, query, hidden=True)
        cls = teacher.combine(whole)
        made = distill_batch(
            cls, LABELS, said=cls[:, 3:6], class_range=SPAN, hidden=whole.hidden, teacher=teacher, query=query
        )
        once = nn.functional.cross_entropy(cls[:, 3:6], torch.tensor(LABELS)).item()
        assert distiller.loss(made).item() == pytest.approx(once * (1 + 1 / 2 + 1 / 4 + 1 / 8), rel=1e-4)


def test_gradients_reach_the_student_and_the_connectors_only(spec, distill_batch, tokens, wide):
    teacher = wide(learner="coda", learnt=2)
    distiller = DISTILLERS["blockwise"](spec())
    hidden = [h.requires_grad_() for h in tokens(3, 6, 16)]
    cls = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    query = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    said = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    distiller.loss(distill_batch(cls, LABELS, None, said, SPAN, hidden, (), teacher, query)).backward()
    assert [h.grad is not None for h in hidden] == [i + 1 in (2, 3, 4) for i in range(6)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.parameters())
    assert all(p.grad is None for p in [*teacher.parameters(), *teacher.backbone.parameters()])


def test_what_all_agree_on_is_a_target(spec, distill_batch, tokens, wide):
    # The mean is not pulled at: the student's gradient is that of a constant target.
    teacher, hidden = wide(), tokens(3, 6, 16)
    distiller = DISTILLERS["blockwise"](spec())
    cls = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    said = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    distiller.loss(distill_batch(cls, LABELS, None, said, SPAN, hidden, (), teacher)).backward()
    again = cls.detach()[:, 3:6].clone().requires_grad_()
    with torch.no_grad():
        mean = torch.stack([*stones(distiller, teacher, hidden), again.detach()]).mean(dim=0)
    labels = torch.tensor(LABELS)
    loss = 0.5 * nn.functional.cross_entropy(again, labels) + 0.5 * divergence(again, said, 2.0)
    (loss + 0.25 * divergence(again, mean, 2.0)).backward()
    assert torch.allclose(cls.grad[:, 3:6], again.grad, atol=1e-6) and cls.grad[:, :3].abs().max() == 0


def test_a_teacher_of_another_grid(spec, distill_batch, tokens, tiny_vit):
    # The tail has seen 4 patches: 9 patches of the student are resampled for it.
    teacher = PromptedViT(load_backbone(tiny_vit("teacher", 24)).model, ModelSpec("apt", 9, 3, 1)).requires_grad_(False)
    distiller = DISTILLERS["blockwise"](spec(student_grid=3))
    seen = []
    teacher.head.register_forward_hook(lambda *_: seen.append(1))
    cls, said = torch.randn(3, 9), torch.randn(3, 3)
    fine = tokens(3, 6, 16, grid=3)
    coarse = []
    for block in fine:
        maps = nn.functional.adaptive_avg_pool2d(block[:, 1:].transpose(1, 2).reshape(3, 16, 3, 3), 2)
        coarse.append(torch.cat([block[:, :1], maps.flatten(2).transpose(1, 2)], dim=1))
    # A Linear on all tokens and a mean over patches may change places.
    one, two = (
        distiller.loss(distill_batch(cls, LABELS, None, said, SPAN, h, (), teacher)).item() for h in (fine, coarse)
    )
    assert one == pytest.approx(two, rel=1e-4) and len(seen) == 6
