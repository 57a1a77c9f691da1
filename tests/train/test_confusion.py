"""Which classes are taken for which."""

import numpy as np
import pytest

from cdl_edge.train.confusion import PAIRS, WHOLE, confusion
from cdl_edge.train.loop import train


def test_counts_by_hand():
    answers = [(np.array([0, 0, 1]), np.array([0, 1, 1])), (np.array([2, 2, 2, 0]), np.array([1, 1, 0, 1]))]
    got = confusion(answers, 3)
    assert got["matrix"] == [[1, 2, 0], [0, 1, 0], [1, 2, 0]]
    assert (got["images"], got["right"]) == ([3, 1, 3], [1, 1, 0])
    assert got["pairs"] == [[0, 1, 2], [2, 1, 2], [2, 0, 1]]


def test_many_classes_keep_pairs_and_classes_only():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, WHOLE + 1, (2, 2000))
    got = confusion([(labels, predicted)], WHOLE + 1)
    assert got["matrix"] is None and len(got["pairs"]) == PAIRS
    assert sum(got["images"]) == 2000 and sum(got["right"]) == (labels == predicted).sum()
    counts = [count for _, _, count in got["pairs"]]
    assert counts == sorted(counts, reverse=True)
    true, answer, count = got["pairs"][0]
    assert count == ((labels == true) & (predicted == answer)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["learned", "ranpac"])
def test_a_run_counts_what_its_matrix_says(tmp_path, make_config, head):
    metrics = train(make_config(tmp_path / "run", head=head, distill="none"), quiet=True)
    counts, last = metrics["student"]["confusion"], metrics["student"]["matrix"][-1]
    for task, classes in enumerate(metrics["tasks"]):
        right, images = (sum(counts[k][c] for c in classes) for k in ("right", "images"))
        assert 100 * right / images == pytest.approx(last[task])
    assert [sum(row) for row in counts["matrix"]] == counts["images"]
    assert sum(counts["images"]) == metrics["images"]["val"]
    pictures = metrics["student"]["pictures"]
    assert {p["true"] == p["answer"] for p in pictures if p["kind"] == "wrong"} <= {False}
    assert all(
        p["true"] == p["answer"] and p["probability"] == p["probability_of_true"]
        for p in pictures
        if p["kind"] == "unsure"
    )
    assert any(p["kind"] == "unsure" for p in pictures)
