"""The teacher's prompts beside the student's: against the plain formulas, and what may not change or learn."""

import copy
import math

import numpy as np
import pytest
import torch

from cdl_edge.train.augment import Normalise
from cdl_edge.train.learners import LEARNERS, LearnerSpec
from cdl_edge.train.learners.mapped import MappedPrompts, PromptAttention
from cdl_edge.train.student import ModelSpec, PromptedViT

POOLS = ("l2p", "dualprompt", "coda")
BLOCKS = {"l2p": (0,), "dualprompt": (0, 1, 2, 3, 4), "coda": (0, 1, 2, 3, 4)}
TEACHER = (24, 6)
CLASSES, TASKS, LEARNT = 6, 3, 2


@pytest.fixture
def make(backbone):
    """make(learner, kd=False, teacher=(width, depth)): large prompts, keys and mappings, two tasks learnt."""

    def make(learner, kd=False, teacher=TEACHER, seed=0):
        model = PromptedViT(
            backbone.model, ModelSpec(learner, CLASSES, TASKS, seed, kd=(6, 6) if kd else None, mapped=teacher)
        )
        generator = torch.Generator().manual_seed(seed)
        for task in range(LEARNT):
            for side in (model.learner, model.mapped.teacher):
                side.begin_task(task)
        for p in model.parameters():
            p.data.normal_(generator=generator)
        for p in model.mapped.attention.parameters():
            p.data /= TEACHER[0] ** 0.5  # scores of about 1: neither a mean nor a maximum
        if learner == "l2p":
            for side in (model.learner, model.mapped.teacher):
                side.used[torch.randperm(30, generator=generator)[:12]] = True
        return model.eval()

    return make


@pytest.fixture
def naive_mapped(naive):
    """`Naive` with the teacher's rows mapped one by one in front of the student's own."""

    def attend(w, rows):
        asked, asked_for, given = (
            [w[f"{part}.weight"] @ row + w[f"{part}.bias"] for row in rows] for part in ("query", "key", "value")
        )
        out = []
        for q in asked:
            scores = np.array([q @ k / math.sqrt(len(k)) for k in asked_for])
            shares = np.exp(scores) / np.exp(scores).sum()
            out.append(sum(s * v for s, v in zip(shares, given, strict=True)))
        return out

    class NaiveMapped(naive):
        def __init__(self, model, backbone, learner):
            super().__init__(model, backbone, learner)
            mapped = {k: v.detach().double().numpy() for k, v in model.mapped.state_dict().items()}
            self.teacher = copy.copy(self)
            self.teacher.l = {k.removeprefix("teacher."): v for k, v in mapped.items() if k.startswith("teacher.")}
            self.maps = {
                i: {k.removeprefix(f"attention.{i}."): v for k, v in mapped.items() if k.startswith(f"attention.{i}.")}
                for i in range(self.depth)
            }
            self.groups = {"l2p": 5}.get(learner, 1)  # L2P: each of the five entries on its own

        def prompt(self, i, q):
            theirs = naive.prompt(self.teacher, i, q)
            together = []
            for rows, own in zip(theirs, super().prompt(i, q), strict=True):
                size = len(rows) // self.groups
                pieces = [rows[n : n + size] for n in range(0, len(rows), max(1, size))]
                together.append([r for piece in pieces for r in attend(self.maps[i], piece)] + own)
            return tuple(together)

    return NaiveMapped


def spec_of(width=16, depth=6, seed=0):
    return LearnerSpec(width, depth, 16, TASKS, seed)


@pytest.mark.parametrize("kd", [False, True])
@pytest.mark.parametrize("learner", POOLS)
def test_logits_equal_the_plain_formulas(make, naive_mapped, backbone, pixels, learner, kd):
    model = make(learner, kd)
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        got = model.combine(model(model.embed(normalise(pixels[:2])))).numpy()
    plain = naive_mapped(model, backbone, learner)
    expected = np.stack([plain.logits(p) for p in pixels[:2]])
    assert np.abs(expected).max() > 0.1 and np.abs(expected[0] - expected[1]).max() > 0.01
    assert np.abs(got - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("learner", POOLS)
def test_every_part_matters(make, tokens, learner):
    model = make(learner)
    tensors = dict(model.mapped.named_parameters())
    with torch.no_grad():
        before = model(tokens).cls_logits
        for name, part in tensors.items():
            kept = part.clone()
            is_key = name.startswith("teacher.key")
            part.add_(-2 * kept if is_key else torch.randn(part.shape, generator=torch.Generator().manual_seed(0)))
            moved = (model(tokens).cls_logits - before).abs().max()
            if name.endswith("key.bias") and name.startswith("attention"):
                assert moved < 1e-4  # the same for every row: the softmax does not see it
            else:
                assert moved > 1e-4, name
            part.copy_(kept)


def test_the_attention_by_hand():
    attention = PromptAttention(2, 1)
    with torch.no_grad():
        for layer in (attention.query, attention.key):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
        attention.value.weight.copy_(torch.tensor([[1.0, 10.0]]))
        attention.value.bias.fill_(0.5)
        got = attention(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    near, far = math.exp(1 / math.sqrt(2)), math.exp(4 / math.sqrt(2))
    expected = [(near * 1.5 + 20.5) / (near + 1), (1.5 + far * 20.5) / (1 + far)]
    assert got.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("learner", POOLS)
def test_mapped_blocks_are_those_with_rows(make, learner):
    assert make(learner).mapped.blocks() == BLOCKS[learner]
    # A block that one side does not have has no prompt, or one that nothing ever taught.
    assert make(learner, teacher=(24, 3)).mapped.blocks() == BLOCKS[learner][:3]
    assert MappedPrompts(LEARNERS[learner], spec_of(depth=2), (24, 12)).blocks() == BLOCKS[learner][:2]


@pytest.mark.parametrize("learner", POOLS)
def test_a_shallow_teacher_runs(make, tokens, learner):
    assert torch.isfinite(make(learner, teacher=(40, 3))(tokens).cls_logits).all()


@pytest.mark.parametrize("learner", POOLS)
def test_mapped_rows_stand_in_front_of_the_own(make, tokens, learner):
    model = make(learner)
    with torch.no_grad():
        query = model.query(tokens)
        for block in range(6):
            own = model.learner.at_block(block, query, training=False)
            both = model.mapped.beside(block, query, own)
            if block not in BLOCKS[learner]:
                assert own is None and both is None
                continue
            keys, values = model.mapped.at_block(block, query)
            assert keys.shape[-1] == values.shape[-1] == 16
            assert keys.shape[1] == own.keys.shape[1]  # the teacher's learner is of the same kind
            assert torch.equal(both.keys, torch.cat([keys, own.keys], dim=1))
            assert torch.equal(both.values, torch.cat([values, own.values], dim=1))
            assert both.weights is own.weights and both.loss is own.loss


def test_an_entry_of_l2p_is_mapped_the_same_whoever_is_selected_with_it(make, tokens):
    model = make("l2p")
    with torch.no_grad():
        query = model.query(tokens)
        theirs = model.mapped.teacher.at_block(0, query, training=False)
        keys, values = model.mapped.at_block(0, query)
        for rows, whole in ((keys, theirs.keys), (values, theirs.values)):
            alone = model.mapped.mapping(0)(whole.unflatten(1, (5, 10))).flatten(1, 2)
            assert (rows - alone).abs().max() < 1e-5


@pytest.mark.parametrize("learner", POOLS)
def test_training_sees_the_teachers_rows_of_inference(make, tokens, learner):
    model = make(learner)
    seen = []
    real = model.mapped.teacher.at_block
    model.mapped.teacher.at_block = lambda block, query, training: (
        seen.append((block, training)) or real(block, query, training)
    )
    state = {k: v.clone() for k, v in model.mapped.state_dict().items()}
    model(tokens, training=True)
    assert seen == [(block, False) for block in BLOCKS[learner]]
    # Nor is a selection noted in the copy.
    assert all(torch.equal(v, state[k]) for k, v in model.mapped.state_dict().items())


@pytest.mark.parametrize("learner", POOLS)
def test_the_mapping_learns_and_the_copy_does_not(backbone, tokens, learner):
    model = PromptedViT(backbone.model, ModelSpec(learner, CLASSES, TASKS, 0, mapped=TEACHER))
    teacher = LEARNERS[learner](LearnerSpec(24, 6, 16, TASKS, 1))
    for side in (model.learner, teacher):
        side.begin_task(0)
    model.mapped.copy(teacher)
    learning = {id(p) for p in model.trainable()}
    assert all(id(p) in learning for p in model.mapped.attention.parameters())
    assert not any(id(p) in learning for p in model.mapped.teacher.parameters())
    model(tokens, training=True).cls_logits.square().sum().backward()
    for name, p in model.mapped.attention.named_parameters():
        assert p.grad is not None and (p.grad.abs().sum() > 0 or name.endswith("key.bias")), name
    assert all(p.grad is None for p in model.mapped.teacher.parameters())


@pytest.mark.parametrize("learner", POOLS)
def test_copy_takes_everything_and_keeps_it(make, tokens, learner):
    model = make(learner)
    teacher = LEARNERS[learner](LearnerSpec(24, 6, 16, TASKS, 9))
    teacher.begin_task(0)
    model.mapped.copy(teacher)
    copied, original = model.mapped.teacher.state_dict(), teacher.state_dict()
    assert copied.keys() == original.keys() and all(torch.equal(copied[k], v) for k, v in original.items())
    assert model.mapped.teacher.learnt == 1 and model.learner.learnt == LEARNT
    with torch.no_grad():
        before = model(tokens).cls_logits
        for p in teacher.parameters():
            p.add_(1)
        assert torch.equal(model(tokens).cls_logits, before)
    assert not any(p.requires_grad for p in model.mapped.teacher.parameters())


def test_initial_values_depend_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = MappedPrompts(LEARNERS["coda"], spec_of(), TEACHER)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two, other = (MappedPrompts(LEARNERS["coda"], spec_of(seed=s), TEACHER) for s in (0, 1))
    weights = [m.mapping(3).value.weight for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_student_without_a_teacher_has_nothing_of_it(backbone):
    model = PromptedViT(backbone.model, ModelSpec("coda", CLASSES, TASKS, 0))
    assert model.mapped is None and not any("mapped" in k for k in model.state_dict())
