"""The accuracy matrix, worked out by hand."""

import pytest

from cdl_edge.train.metrics import DEFINITIONS, AccuracyMatrix


def filled():
    matrix = AccuracyMatrix(3)
    matrix.add([90.0])
    matrix.add([80.0, 70.0])
    matrix.add([60.0, 75.0, 50.0])
    return matrix


def test_summary():
    got = filled().summary()
    assert got["matrix"] == [[90.0, None, None], [80.0, 70.0, None], [60.0, 75.0, 50.0]]
    assert got["accuracy_after_task"] == pytest.approx([90, 75, 185 / 3])
    assert got["average_accuracy"] == pytest.approx(185 / 3)
    assert got["incremental_accuracy"] == pytest.approx((90 + 75 + 185 / 3) / 3)
    # (90-60) + (70-75) + (50-50), over all T = 3 tasks; learning more may also raise an earlier task.
    assert got["forgetting"] == pytest.approx(25 / 3)
    assert got["forgetting_after_task"] == pytest.approx([0, 10 / 2, 25 / 3])


def test_zero_is_an_accuracy():
    matrix = AccuracyMatrix(2)
    matrix.add([0.0])
    matrix.add([0.0, 100.0])
    assert matrix.summary()["average_accuracy"] == 50 and matrix.summary()["forgetting"] == 0
    falling = AccuracyMatrix(2)
    falling.add([40.0])
    falling.add([0.0, 0.0])
    assert falling.summary()["forgetting"] == 20


def test_one_task():
    matrix = AccuracyMatrix(1)
    matrix.add([33.0])
    got = matrix.summary()
    assert (got["average_accuracy"], got["forgetting"], got["incremental_accuracy"]) == (33, 0, 33)


def test_rows_come_in_order():
    with pytest.raises(AssertionError):
        AccuracyMatrix(3).add([1.0, 2.0])


def test_a_matrix_continues_from_its_rows():
    rows = filled().rows[:2]
    matrix = AccuracyMatrix(3, rows)
    matrix.add([60.0, 75.0, 50.0])
    assert matrix.summary() == filled().summary()
    assert len(rows) == 2  # a copy


def test_csv(tmp_path):
    filled().write_csv(tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text().splitlines() == [
        "after,task1,task2,task3",
        "task1,90.0000,,",
        "task2,80.0000,70.0000,",
        "task3,60.0000,75.0000,50.0000",
    ]


def test_every_number_is_defined():
    assert set(filled().summary()) | {"forgetting_of_joint", "baseline", "confusion"} == set(DEFINITIONS)
    assert all(len(text) > 10 for text in DEFINITIONS.values())
