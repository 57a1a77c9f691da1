"""What all learners share."""

import pytest
import torch

from cdl_edge.train.learners import LEARNERS, LearnerSpec
from cdl_edge.train.learners.base import cosine, halves


def spec(**changes):
    return LearnerSpec(**{"width": 16, "depth": 6, "key_width": 12, "tasks": 3, "seed": 0, **changes})


def test_the_learners_are_there():
    assert list(LEARNERS) == ["l2p", "dualprompt", "coda", "apt", "finetune", "frozen"]


def test_cosine_is_a_table_of_cosines():
    q, k = torch.tensor([[3.0, 4.0], [0.0, -2.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert torch.allclose(cosine(q, k), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_halves_are_keys_then_values():
    keys, values = halves(torch.arange(6.0).reshape(1, 6, 1))
    assert keys.flatten().tolist() == [0, 1, 2] and values.flatten().tolist() == [3, 4, 5]


@pytest.mark.parametrize("name", LEARNERS)
def test_the_interface(name):
    learner = LEARNERS[name](spec())
    assert learner.learnt == 0
    learner.begin_task(0)
    assert learner.learnt == 1
    query = torch.randn(4, 12) if learner.needs_query else None
    dependent = []
    for block in range(6):
        prompt = learner.at_block(block, query, training=False)
        if prompt is None:
            continue
        assert prompt.loss is None
        for rows in (prompt.keys, prompt.values):
            assert rows is None or (rows.ndim == 3 and rows.shape[0] in (1, 4) and rows.shape[2] == 16)
        if prompt.weights is not None:
            assert prompt.weights.shape[0] == 4 and not prompt.weights.requires_grad
            dependent.append(block)
    assert tuple(dependent) == learner.blocks()
    assert learner.at_block(5, query, False) is None or name == "apt"
    without = dict.fromkeys(("apt", "finetune", "frozen"), "none")
    assert learner.selection["kind"] == {"coda": "weighted", **without}.get(name, "top-k")


@pytest.mark.parametrize("name", LEARNERS)
def test_a_task_starts_from_the_same_numbers_however_it_is_reached(name):
    # A resumed run begins a task in a process that has begun no other.
    one, two = LEARNERS[name](spec()), LEARNERS[name](spec())
    one.begin_task(0)
    one.end_task(0)
    torch.manual_seed(99)
    two.load_state_dict(one.state_dict())
    one.begin_task(1)
    two.begin_task(1)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
