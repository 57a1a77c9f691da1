"""The first things that people ask: how good, better than a frozen backbone, and what is taken for what?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdl_edge.artefacts.run_record import Metrics
from cdl_edge.errors import InputError
from cdl_edge.report.mistakes import mistakes_section, verdict
from cdl_edge.report.model_page import write_report

COUNTS = [
    [8, 2, 0, 0, 0, 0],
    [5, 5, 0, 0, 0, 0],
    [0, 0, 9, 0, 0, 1],
    *([10 * (i == j) for j in range(6)] for i in (3, 4, 5)),
]


@pytest.fixture
def counted(metrics: dict[str, Any]) -> dict[str, Any]:
    metrics["images"] = {"train": 600, "val": 60}
    metrics["baseline"] = {"head": "ranpac", "average_accuracy": 80.0, "heads": {"ranpac": 80.0, "slda": 79.0}}
    metrics["student"]["forgetting_of_joint"] = 3.97
    metrics["student"]["confusion"] = {
        "images": [10] * 6,
        "right": [8, 5, 9, 10, 10, 10],
        "pairs": [[1, 0, 5], [0, 1, 2], [2, 5, 1]],
        "matrix": COUNTS,
    }
    return metrics


@pytest.mark.parametrize(
    ("baseline", "good", "words"),
    [
        (50.0, True, "33.8 points more than the frozen backbone with a RanPAC head"),
        (99.0, False, "15.2 points less than the frozen backbone"),
        (83.82333, None, "no better than the frozen backbone"),
        (82.0, None, "may be chance"),  # of 60 pictures
    ],
)
def test_verdict(counted: dict[str, Any], baseline: float, good: bool | None, words: str) -> None:
    counted["baseline"]["average_accuracy"] = baseline
    found = verdict(Metrics.of(counted, "metrics.json"))
    assert len(found["sentences"]) == 2 and found["good"] is good
    assert "83.8 % of the held-out pictures" in found["sentences"][0] and "60 pictures" in found["sentences"][0]
    assert words in found["sentences"][1]
    assert ("--learner frozen" in found["sentences"][1]) == (good is False)


@pytest.mark.parametrize(("baseline", "more"), [(83.82333, "."), (90.0, "; with a RanPAC head it names 90.0 %.")])
def test_verdict_of_the_frozen_backbone_itself(counted: dict[str, Any], baseline: float, more: str) -> None:
    counted["baseline"]["average_accuracy"] = baseline
    counted["config"] |= {"learner": "frozen", "head": "slda"}
    found = verdict(Metrics.of(counted, "metrics.json"))
    said = "It is the frozen backbone with a SLDA head: nothing else was learnt"
    assert found["sentences"][1] == said + more and found["good"] is None


def test_verdict_of_a_run_of_before(metrics: dict[str, Any]) -> None:
    found = verdict(Metrics.of(metrics, "metrics.json"))
    assert found["good"] is None and "not recorded" in found["sentences"][1]


def test_the_page_answers_first(
    tmp_path: Path, counted: dict[str, Any], save_run: Callable[..., Path], read_page: Callable[[Path], Any]
) -> None:
    page = read_page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", counted)))
    assert page.sections == {"mistakes", "pictures", "accuracy", "card"}
    order = ["points more than the frozen backbone", "Frozen baseline", "Confusion matrix", "Most confused pairs"]
    order += [
        "Accuracy of each class",
        "Frozen baseline (RanPAC)",
        "Average accuracy · ",
        "Every task after every task",
    ]
    order += ["Intended use"]
    found = [page.text.replace("  ", " ").find(text) for text in order]
    assert -1 not in found and found[2:] == sorted(found[2:])
    assert "5 of 10" in page.text and "wasp" in page.text
    assert "3.97 with all images at once" in page.text and "The student's head from all images at once" in page.text
    assert page.html.count("<details") == page.html.count("</details>")
    # What is folded is there all the same.
    assert "seed" in page.text.lower() and "What the metrics mean" in page.text


def test_worst_class_first(counted: dict[str, Any]) -> None:
    found = mistakes_section(Metrics.of(counted, "metrics.json"))
    assert found is not None
    assert [c["name"] for c in found["classes"][:2]] == ["wasp", "bee"]
    assert found["classes"][0]["text"] == "50 %" and found["pairs"][0] == ("wasp", "bee", "5 of 10")
    assert found["rows"][1]["cells"][0]["title"] == "5 of 10 pictures of wasp: called bee"
    assert found["rows"][1]["cells"][2] is None


def test_many_classes_have_no_matrix(
    tmp_path: Path, counted: dict[str, Any], save_run: Callable[..., Path], read_page: Callable[[Path], Any]
) -> None:
    counted["student"]["confusion"]["matrix"] = None
    page = read_page(write_report(tmp_path / "r.html", save_run(tmp_path / "run", counted)))
    assert "Confusion matrix" not in page.text and "Most confused pairs" in page.text


def test_a_run_of_before_has_no_such_section(metrics: dict[str, Any]) -> None:
    assert mistakes_section(Metrics.of(metrics, "metrics.json")) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"baseline": {"head": "slda", "average_accuracy": 101}}, "baseline.average_accuracy"),
        ({"baseline": {"head": 3, "average_accuracy": 10.0}}, "baseline.head"),
        ({"baseline": [1]}, "baseline"),
        ({"images": [10] * 5}, "confusion.images"),
        ({"right": [11] * 6}, "confusion.right"),
        ({"pairs": [[0, 6, 1]]}, "confusion.pairs"),
        ({"matrix": COUNTS[:5]}, "confusion.matrix"),
        ({"matrix": [[1] * 6] * 6}, "confusion.matrix"),
    ],
)
def test_malformed_numbers_are_refused(
    tmp_path: Path, counted: dict[str, Any], save_run: Callable[..., Path], change: dict[str, Any], word: str
) -> None:
    (counted if "baseline" in change else counted["student"]["confusion"]).update(change)
    with pytest.raises(InputError, match=word.replace(".", r"\.")):
        write_report(tmp_path / "r.html", save_run(tmp_path / "run", counted))
