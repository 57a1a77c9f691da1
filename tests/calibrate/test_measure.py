"""Accuracy, calibration error and drops worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.calibrate.measure import BINS, DEFINITIONS, Measured, compare, measure

TASKS = [[0, 1], [2], [3]]


def logits_of(answers, shares):
    """(N, 4): the answer has the probability `shares`, the three others what is left."""
    found = np.zeros((len(answers), 4))
    for row, (answer, share) in enumerate(zip(answers, shares, strict=True)):
        found[row] = np.log((1 - share) / 3)
        found[row, answer] = np.log(share)
    return found.astype(np.float32)


def test_by_hand():
    labels = np.array([0, 1, 0, 1, 2, 2])
    answers = np.array([0, 1, 0, 3, 2, 0])  # task 1: 3 of 4, task 2: 1 of 2, task 3: no images
    shares = [0.95, 0.95, 0.95, 0.95, 0.5, 0.5]
    found = measure(logits_of(answers, shares), labels, TASKS)
    assert found.per_task == [75.0, 50.0, None]
    assert found.average_accuracy == 62.5
    assert found.confidence == pytest.approx(0.8)
    # Two bins: |3/4 - 0.95| of 4 images, |1/2 - 0.5| of 2.
    assert found.calibration_error == pytest.approx(100 * 4 / 6 * 0.2, abs=1e-4)
    assert found.to_json() == vars(found)


def test_calibration_error_of_a_perfect_and_of_a_boastful_answer():
    labels = np.zeros(10, int)
    sure = logits_of(np.zeros(10, int), [0.9999999] * 10)
    assert measure(sure, labels, [[0, 1, 2, 3]]).calibration_error == pytest.approx(0, abs=1e-3)
    wrong = logits_of(np.ones(10, int), [0.9999999] * 10)
    assert measure(wrong, labels, [[0, 1, 2, 3]]).calibration_error == pytest.approx(100, abs=1e-3)


def test_bins_do_not_cancel_each_other():
    """Too sure in one bin, too modest in another: the mean gap is 0, the error is not."""
    labels = np.zeros(4, int)
    answers = np.array([0, 0, 0, 1])
    shares = [0.45, 0.45, 0.95, 0.95]  # right 2 of 2 at 0.45, 1 of 2 at 0.95
    found = measure(logits_of(answers, shares), labels, [[0, 1, 2, 3]])
    assert found.calibration_error == pytest.approx(100 * 0.5 * (0.55 + 0.45), abs=1e-3)
    assert int(0.45 * BINS) != int(0.95 * BINS)


def test_drops_and_quantisation_forgetting():
    before = Measured([80.0, 60.0, None, 90.0], 76.0, 0.7, 5.0)
    after = Measured([77.0, 59.0, None, 89.5], 75.0, 0.65, 6.5)
    found = compare(before, after)
    assert found["drop"] == {"per_task": [3.0, 1.0, None, 0.5], "average": 1.5}
    assert found["quantisation_forgetting"] == 1.5  # (3 + 1) / 2 - 0.5
    assert found["confidence_shift"] == pytest.approx(-0.05)
    assert found["calibration_error_shift"] == 1.5


def test_a_gain_is_a_negative_drop():
    found = compare(Measured([50.0, 50.0], 50.0, 0.5, 1.0), Measured([60.0, 50.0], 55.0, 0.5, 1.0))
    assert found["drop"] == {"per_task": [-10.0, 0.0], "average": -5.0}
    assert found["quantisation_forgetting"] == -10.0


@pytest.mark.parametrize("accuracies", [[None, None, 50.0], [50.0, 40.0, None], [70.0]])
def test_forgetting_needs_images_of_the_last_task_and_of_an_earlier_one(accuracies):
    one = Measured(accuracies, 50.0, 0.5, 1.0)
    assert compare(one, one)["quantisation_forgetting"] is None
    assert compare(one, one)["drop"]["average"] == 0.0


def test_every_number_is_defined():
    one = Measured([50.0, 40.0], 50.0, 0.5, 1.0)
    verdicts = {"agreement", "paired", "gate", "shortfall"}
    said = {*one.to_json(), *compare(one, one), *verdicts} - {"average_accuracy"}
    assert {name.removesuffix("_shift") for name in said} == set(DEFINITIONS)
