"""The exact test of a loss, and the gate that knows what its images can tell."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from cdl_edge.calibrate.floor import shortfall
from cdl_edge.calibrate.paired import FEWEST, LEVEL, Paired
from cdl_edge.calibrate.search import Gate


def answers(count: int, right: set[int], classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) that are right for the images in `right`, and the labels (N,): half of them of each task."""
    labels = np.arange(count) % classes
    said = np.array([label if i in right else (label + 1) % classes for i, label in enumerate(labels)])
    return np.eye(classes, dtype=np.float32)[said], labels


TASKS = ((0, 1), (2, 3))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (7, 3), (3, 7), (40, 20), (900, 800)])
def test_the_probability_is_the_binomial_one(lost, won):
    expected = binomtest(lost, lost + won, 0.5, "greater").pvalue if lost + won else 1.0
    assert Paired(5000, lost, won).p == pytest.approx(expected)


def test_the_fewest_answers_that_say_something():
    assert not Paired(100, FEWEST - 1, 0).significant and Paired(100, FEWEST, 0).significant
    assert Paired(100, FEWEST, 0).p < LEVEL <= Paired(100, FEWEST - 1, 0).p
    assert Paired(500, 0, 0).smallest == pytest.approx(1.0)


def test_it_counts_only_answers_that_differ():
    before = np.array([True, True, False, False, True])
    after = np.array([True, False, True, False, False])
    found = Paired.of(before, after)
    assert (found.images, found.lost, found.won, found.drop) == (5, 2, 1, pytest.approx(20.0))
    assert found.to_json()["p"] == found.p


def test_one_answer_of_91_is_not_judged():
    """1.1 points with --max-drop 1: it left 31 of 45 layers in float."""
    before, labels = answers(91, set(range(60)))
    after, _ = answers(91, set(range(59)))
    verdict = Gate(1.0).judge(before, after, labels, TASKS)
    assert verdict.failures == [] and verdict.name == "not decided"
    assert any("may be chance" in line and "1 answers lost, 0 won" in line for line in verdict.unsure)
    same = Gate(1.0).judge(before, before, labels, TASKS)
    assert same.name == "not decided"  # nothing lost, but 91 images would not show a point
    assert "the average: 91 images show no loss below 5.5 points" in same.unsure


def test_a_loss_that_is_one_fails():
    before, labels = answers(2000, set(range(1500)))
    after, _ = answers(2000, set(range(1400)))
    verdict = Gate(1.0).judge(before, after, labels, TASKS)
    assert verdict.failures == ["task 1 loses 5.00 points", "task 2 loses 5.00 points", "the average loses 5.00 points"]
    assert Gate(1.0).judge(before, before, labels, TASKS).name == "passed"
    assert Gate(5.0).judge(before, after, labels, TASKS).name == "passed"  # exactly what is allowed


def test_what_one_task_wins_does_not_pay_for_another():
    before, labels = answers(4000, set(range(2000)))
    gone = {i for i in range(2000) if labels[i] in (0, 1)} - set(range(1800))  # 100 of task 1
    came = {i for i in range(2000, 2200) if labels[i] in (2, 3)}  # as many of task 2
    after, _ = answers(4000, set(range(2000)) - gone | came)
    assert Gate(1.0).judge(before, after, labels, TASKS).failures == ["task 1 loses 5.00 points"]


def test_tasks_without_images_are_left_out():
    before, labels = answers(2000, set(range(1500)))
    assert Gate(1.0).judge(before, before, labels, (*TASKS, (4, 5))).name == "passed"


def test_the_floor():
    expected, labels = answers(1000, set(range(1000)))
    assert shortfall(expected, expected, labels, TASKS) is None
    for wrong, words in ((40, "96.0 % of 1000 images"), (25, "2.5 points of accuracy are lost")):
        after, _ = answers(1000, set(range(1000 - wrong)))
        assert words in (shortfall(expected, after, labels, TASKS) or "")
    after, _ = answers(1000, set(range(992)))
    assert shortfall(expected, after, labels, TASKS) is None
    assert shortfall(expected, expected * np.nan, labels, TASKS) == "its answers are not finite"
    # Without labels the answers alone decide: two of four pictures are none.
    four, _ = answers(4, {0, 1})
    assert "50.0 % of 4 images" in (shortfall(answers(4, {0, 1, 2, 3})[0], four, None, TASKS) or "")
