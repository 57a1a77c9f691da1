"""CODA-Prompt: the sum, the components that stay, the orthonormal start."""

import math

import pytest
import torch

from cdl_edge.train.learners.base import LearnerSpec
from cdl_edge.train.learners.coda import BLOCKS, LENGTH, CODAPrompt


def make(width=16, key_width=12, tasks=4, seed=0):
    return CODAPrompt(LearnerSpec(width, 12, key_width, tasks, seed))


@pytest.mark.slow
@pytest.mark.parametrize("learnt", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_weights_and_rows_follow_the_formula(learnt, training):
    learner = make()
    for task in range(learnt):
        learner.begin_task(task)
    query = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in BLOCKS:
            got = learner.at_block(block, query, training)
            prompt, key, a = (t[str(block)] for t in (learner.prompt, learner.key, learner.attention))
            for b in range(3):
                rows = torch.zeros(LENGTH, 16)
                for k in range(25 * learnt):
                    focused = query[b] * a[k]
                    weight = (focused @ key[k]).item() / math.sqrt(
                        (focused @ focused).item() * (key[k] @ key[k]).item()
                    )
                    assert got.weights[b, k].item() == pytest.approx(weight, abs=1e-5)
                    rows += weight * prompt[k]
                assert torch.allclose(torch.cat([got.keys[b], got.values[b]]), rows, atol=1e-5)
            assert got.weights.shape == (3, 25 * learnt)


def test_no_block_behind_the_fifth():
    learner = make()
    learner.begin_task(0)
    assert [b for b in range(12) if learner.at_block(b, torch.randn(1, 12), False) is not None] == [0, 1, 2, 3, 4]


def test_components_are_split_evenly_over_the_tasks():
    assert make(tasks=10).per_task == 10
    assert make(tasks=3).per_task == 33
    assert make(tasks=300).per_task == 1  # more tasks than components: one each
    extended = CODAPrompt(LearnerSpec(16, 12, 12, 6, 0, pool_tasks=4))
    assert extended.per_task == 25 and extended.key["0"].shape == (150, 12)  # those that came first keep theirs


@pytest.mark.slow
def test_new_components_are_orthonormal():
    learner = make(width=128, key_width=110)  # wider than the 100 components
    for task in range(4):
        learner.begin_task(task)
    for table in (learner.prompt, learner.key, learner.attention):
        for block in BLOCKS:
            rows = table[str(block)].data.flatten(1)
            assert torch.allclose(rows @ rows.t(), torch.eye(100), atol=1e-5)


def test_new_components_are_orthogonal_to_earlier_ones_that_have_moved():
    learner = make(width=128, key_width=110)
    learner.begin_task(0)
    for p in learner.parameters():
        p.data[:25] += 0.5 * torch.randn(p.data[:25].shape, generator=torch.Generator().manual_seed(0))
    learner.begin_task(1)
    for table in (learner.prompt, learner.key, learner.attention):
        rows = table["2"].data.flatten(1)
        old, new = rows[:25], rows[25:50]
        assert (new @ torch.nn.functional.normalize(old, dim=1).t()).abs().max() < 1e-5
        assert torch.allclose(new @ new.t(), torch.eye(25), atol=1e-5)


def test_more_components_than_width():
    learner = make(width=16, key_width=12)  # 12 directions, 100 keys
    for task in range(4):
        learner.begin_task(task)
    for table in (learner.key, learner.attention):
        rows = table["0"].data
        assert torch.isfinite(rows).all()
        assert torch.allclose(rows.norm(dim=1), torch.ones(100), atol=1e-5)
        assert torch.allclose(rows[:12] @ rows[:12].t(), torch.eye(12), atol=1e-5)
        others = rows[12:] @ rows[12:].t() - torch.eye(88)
        assert others.abs().max() < 0.9999  # no two of the rest are the same


def test_earlier_components_do_not_move_not_even_by_adam(make_model, tokens):
    model = make_model("coda", learnt=1)
    model.learner.begin_task(1)
    tables = [p for d in (model.learner.prompt, model.learner.key, model.learner.attention) for p in d.values()]
    before = [t.data.clone() for t in tables]
    optimiser = torch.optim.Adam(model.trainable(), lr=0.1, betas=(0.9, 0.999))
    for _ in range(3):
        optimiser.zero_grad(set_to_none=True)
        output = model(tokens, training=True)
        torch.nn.functional.cross_entropy(output.cls_logits, torch.arange(5)).backward()
        optimiser.step()
    n = model.learner.per_task
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table.data[:n], old[:n])  # bitwise
        assert torch.equal(table.data[2 * n :], old[2 * n :])  # nor those of tasks to come
        assert (table.data[n : 2 * n] != old[n : 2 * n]).any()


def test_earlier_components_still_take_part_in_the_forward_pass_of_training(make_model, tokens):
    model = make_model("coda", learnt=2)
    with torch.no_grad():
        assert torch.equal(model(tokens, training=True).cls_logits, model(tokens).cls_logits)


def test_components_of_later_tasks_do_nothing(make_model, tokens):
    model = make_model("coda", learnt=1)
    with torch.no_grad():
        before = model(tokens).cls_logits
        for p in model.learner.parameters():
            p[model.learner.per_task :] = 7.0
        assert torch.equal(model(tokens).cls_logits, before)
