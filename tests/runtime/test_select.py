"""Prompt selection against examples worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime.select import selected

WEIGHTS = np.array(
    [
        [[0.1, 0.9, 0.5, -1.0], [0.4, 0.3, 0.2, 0.1]],
        [[-0.5, -0.1, -0.9, -0.2], [0.0, 0.0, 1.0, 0.5]],
    ]
)


def test_top_k_block_after_block():
    one, two = selected(WEIGHTS, {"kind": "top-k", "k": 2, "blocks": [0, 1]})
    assert one == {"selected": [1, 2, 0, 1], "weights": [0.9, 0.5, 0.4, 0.3]}
    assert two == {"selected": [1, 3, 2, 3], "weights": [-0.1, -0.2, 1.0, 0.5]}


def test_top_1_with_a_tie_takes_the_lower_entry():
    weights = np.array([[[0.5, 0.5, 0.1]], [[0.0, 0.7, 0.7]]])
    assert [s["selected"] for s in selected(weights, {"kind": "top-k", "k": 1, "blocks": [0]})] == [[0], [1]]


def test_weighted_by_mean_absolute_weight():
    # image 0: mean |w| = .25 .60 .35 .55, mean w =  .25  .60 .35 -.45
    # image 1: mean |w| = .25 .05 .95 .35, mean w = -.25 -.05 .05  .15
    one, two = selected(WEIGHTS, {"kind": "weighted", "k": 2, "blocks": [0, 1]})
    assert one["selected"] == [1, 3]
    assert one["weights"] == pytest.approx([0.6, -0.45])
    assert two["selected"] == [2, 3]
    assert two["weights"] == pytest.approx([0.05, 0.15])


def test_all_of_them():
    (one,) = selected(WEIGHTS[:1], {"kind": "weighted", "k": 4, "blocks": [0, 1]})
    assert one["selected"] == [1, 3, 2, 0]


def test_none():
    empty = {"selected": [], "weights": []}
    assert selected(None, {"kind": "none"}, images=2) == [empty, empty]
    assert selected(WEIGHTS, {"kind": "none", "k": 0, "blocks": []}) == [empty, empty]
    lists = selected(None, {"kind": "none"}, images=2)
    assert lists[0]["selected"] is not lists[1]["selected"]


def test_plain_json_values():
    (one, _) = selected(WEIGHTS.astype(np.float32), {"kind": "top-k", "k": 1, "blocks": [0, 1]})
    assert all(type(i) is int for i in one["selected"])
    assert all(type(w) is float for w in one["weights"])


@pytest.mark.parametrize(
    ("weights", "selection", "message"),
    [
        (WEIGHTS, {"kind": "topk", "k": 1}, "did you mean 'top-k'"),
        (WEIGHTS, {}, "unknown selection"),
        (None, {"kind": "top-k", "k": 1}, "needs prompt weights"),
        (WEIGHTS[0], {"kind": "weighted", "k": 1}, "needs prompt weights"),
        (WEIGHTS, {"kind": "top-k", "k": 5}, "1 to 4"),
        (WEIGHTS, {"kind": "weighted", "k": 0}, "1 to 4"),
        (WEIGHTS, {"kind": "weighted"}, "1 to 4"),
    ],
)
def test_refusals(weights, selection, message):
    with pytest.raises(InputError, match=message):
        selected(weights, selection)
