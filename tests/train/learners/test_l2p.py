"""L2P: five of thirty by cosine, and never one that no training image has selected."""

import pytest
import torch

from cdl_edge.train.learners.base import LearnerSpec, cosine
from cdl_edge.train.learners.l2p import L2P, LENGTH, POOL, TOP


@pytest.fixture
def learner():
    made = L2P(LearnerSpec(16, 6, 12, 3, 0))
    made.begin_task(0)
    return made


def queries(n, seed=0):
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


def test_the_five_nearest_entries_are_used_and_their_keys_pulled(learner):
    q = queries(3)
    got = learner.at_block(0, q, training=True)
    similarity = cosine(q, learner.key)
    best = similarity.sort(dim=1, descending=True)
    assert got.loss.item() == pytest.approx((1 - best.values[:, :TOP]).mean().item(), abs=1e-6)
    assert got.keys.shape == got.values.shape == (3, TOP * LENGTH // 2, 16)
    for b in range(3):
        for place, entry in enumerate(best.indices[b, :TOP]):
            part = slice(place * 10, place * 10 + 10)
            assert torch.equal(got.keys[b, part], learner.prompt[entry, :10])
            assert torch.equal(got.values[b, part], learner.prompt[entry, 10:])
    got.loss.backward()
    assert learner.key.grad.abs().sum() > 0


def test_only_block_0_is_prompted(learner):
    assert [b for b in range(6) if learner.at_block(b, queries(1), False) is not None] == [0]


def test_training_notes_what_was_selected(learner):
    assert not learner.used.any()
    q = queries(4)
    learner.at_block(0, q, training=True)
    expected = set(cosine(q, learner.key).topk(TOP).indices.flatten().tolist())
    assert set(torch.nonzero(learner.used).flatten().tolist()) == expected
    assert learner.learnt_entries().tolist() == sorted(expected)
    learner.at_block(0, queries(50, 1), training=False)  # looking does not learn
    assert set(torch.nonzero(learner.used).flatten().tolist()) == expected


def test_unused_entries_are_never_selected_at_inference(learner):
    q = queries(200)
    learner.used[torch.tensor([1, 4, 9, 16, 25, 29])] = True
    with torch.no_grad():
        learner.key[0] = q.mean(0) * 100  # an unlearnt entry right where the queries are
        got = learner.at_block(0, q, training=False)
    selected = got.weights.topk(TOP, dim=1).indices
    assert set(selected.flatten().tolist()) <= {1, 4, 9, 16, 25, 29}
    assert torch.isneginf(got.weights[:, ~learner.used]).all()
    rows = {tuple(r.tolist()) for r in learner.prompt[~learner.used][:, 0]}
    assert not rows & {tuple(r.tolist()) for r in got.keys.flatten(0, 1)}


def test_before_any_training_every_entry_may_be_selected(learner):
    got = learner.at_block(0, queries(2), training=False)
    assert torch.isfinite(got.weights).all() and len(learner.learnt_entries()) == POOL


def test_the_selection_of_one_sample_ignores_the_others(learner):
    # Batch-wise selection lifts published numbers unfairly.
    learner.used[:20] = True
    q = queries(8)
    with torch.no_grad():
        together = learner.at_block(0, q, training=False)
        for i in range(8):
            assert torch.equal(learner.at_block(0, q[i : i + 1], training=False).keys[0], together.keys[i])


def test_the_authors_sum_over_entries_and_mask_none():
    ours, theirs = (L2P(LearnerSpec(16, 6, 12, 3, 0, compat=c)) for c in (False, True))
    q = queries(4)
    losses = [m.at_block(0, q, training=True).loss.item() for m in (ours, theirs)]
    assert losses[1] == pytest.approx(5 * losses[0], rel=1e-5)
    unused = int(torch.nonzero(~theirs.used)[0])
    theirs.key.data[unused] = q[0]  # no image of training has selected it, and it is nearest
    ours.key.data[unused] = q[0]
    got = [m.at_block(0, q, training=False).weights[0].argmax().item() for m in (ours, theirs)]
    assert got[0] != unused and got[1] == unused
    assert theirs.learnt_entries().tolist() == list(range(POOL)) != ours.learnt_entries().tolist()
