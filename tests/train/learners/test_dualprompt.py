"""DualPrompt: the general rows, the task's own entry, and no entry of a task not seen yet."""

import pytest
import torch

from cdl_edge.train.learners.base import LearnerSpec, cosine
from cdl_edge.train.learners.dualprompt import EXPERT_BLOCKS, GENERAL_BLOCKS, DualPrompt


@pytest.fixture
def learner():
    made = DualPrompt(LearnerSpec(16, 6, 12, 4, 0))
    for p in made.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(len(p)))
    made.begin_task(0)
    made.begin_task(1)
    return made


def queries(n, seed=0):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


def test_general_rows_are_the_same_for_everyone(learner):
    for block in GENERAL_BLOCKS:
        for training in (True, False):
            got = learner.at_block(block, queries(3), training)
            assert got.keys.shape == got.values.shape == (1, 3, 16)
            assert torch.equal(torch.cat([got.keys[0], got.values[0]]), learner.general[str(block)])
            assert got.loss is None and got.weights is None


def test_training_uses_the_entry_of_the_task(learner):
    q = queries(5)
    for block in EXPERT_BLOCKS:
        got = learner.at_block(block, q, training=True)
        assert torch.equal(torch.cat([got.keys[0], got.values[0]]), learner.expert[str(block)][1])
        expected = (1 - cosine(q, learner.key[str(block)][1:2])).mean()
        assert got.loss.item() == pytest.approx(expected.item(), abs=1e-6)
        got.loss.backward()
        gradient = learner.key[str(block)].grad
        assert gradient[1].abs().sum() > 0 and gradient[[0, 2, 3]].abs().sum() == 0


def test_inference_takes_the_nearest_key_sample_by_sample(learner):
    q = queries(20)
    for block in EXPERT_BLOCKS:
        got = learner.at_block(block, q, training=False)
        similarity = cosine(q, learner.key[str(block)])
        taken = set()
        for b in range(20):
            best = 0 if similarity[b, 0] >= similarity[b, 1] else 1
            taken.add(best)
            rows = learner.expert[str(block)][best]
            assert torch.equal(got.keys[b], rows[:10]) and torch.equal(got.values[b], rows[10:])
        assert taken == {0, 1}


def test_an_unseen_task_is_never_selected(learner):
    q = queries(50)
    for block in EXPERT_BLOCKS:
        learner.key[str(block)].data[2:] = q.mean(0)  # keys of tasks to come, right where the queries are
        got = learner.at_block(block, q, training=False)
        assert got.weights.shape == (50, 2)
        unseen = learner.expert[str(block)][2:, :10]
        assert not any(torch.equal(rows, other) for rows in got.keys for other in unseen)


def test_blocks(learner):
    assert [b for b in range(6) if learner.at_block(b, queries(1), False) is not None] == [0, 1, 2, 3, 4]
    assert learner.blocks() == (2, 3, 4)


def test_training_a_task_leaves_the_entries_of_others(make_model, tokens):
    model = make_model("dualprompt", learnt=2)
    before = {n: p.data.clone() for n, p in model.learner.named_parameters()}
    optimiser = torch.optim.Adam(model.trainable(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        output = model(tokens, training=True)
        (output.cls_logits.square().mean() + output.key_loss).backward()
        optimiser.step()
    for name, p in model.learner.named_parameters():
        if name.startswith(("expert", "key")):
            assert torch.equal(p.data[[0, 2]], before[name][[0, 2]]), name
            assert not torch.equal(p.data[1], before[name][1]), name


def test_the_authors_may_select_a_task_to_come(learner):
    theirs = DualPrompt(LearnerSpec(16, 6, 12, 4, 0, compat=True))
    theirs.load_state_dict(learner.state_dict())
    q = queries(3)
    for block in EXPERT_BLOCKS:
        theirs.key[str(block)].data[3] = q[0]
        got = theirs.at_block(block, q, training=False)
        assert got.weights.shape == (3, 4)
        assert torch.equal(got.keys[0], theirs.expert[str(block)][3, :10])
        assert theirs.at_block(block, q, training=True).loss.item() == pytest.approx(
            (1 - cosine(q, theirs.key[str(block)][1:2])).mean().item(), abs=1e-6
        )
    assert theirs.learnt_entries().tolist() == [0, 1, 2, 3] and learner.learnt_entries().tolist() == [0, 1]
