"""The sentences around the numbers: what stands beside an accuracy so that nobody is fooled."""

import dataclasses

import pytest

from cdl_edge.artefacts.run_record import SideResult
from cdl_edge.display import baseline_line, baseline_warning, forgetting_line

BASELINE = {"head": "ranpac", "average_accuracy": 98.2}


def test_student_beside_the_frozen_baseline():
    assert baseline_line(98.8, BASELINE) == "student 98.80 %, frozen baseline (ranpac) 98.20 %: +0.60 points"
    assert baseline_line(97.0, BASELINE).endswith(": -1.20 points")
    assert "unknown" in baseline_line(97.0, None)


@pytest.mark.parametrize("accuracy", [98.2, 98.8])
def test_no_warning_at_or_above_the_baseline(accuracy):
    assert baseline_warning(accuracy, BASELINE) is None


def test_no_warning_where_nobody_knows():
    assert baseline_warning(1.0, None) is None


@pytest.mark.parametrize(
    ("config", "there", "absent"),
    [
        ({"learner": "coda", "head": "learned"}, ("--learner frozen", "--head ranpac", "more images"), ()),
        ({"learner": "coda", "head": "ranpac"}, ("--learner frozen", "more images"), ("--head",)),
        (None, ("--learner frozen", "--head ranpac"), ()),
    ],
)
def test_the_warning_proposes_what_the_run_does_not_have(config, there, absent):
    text = baseline_warning(97.0, BASELINE, config)
    assert text is not None and text.startswith("warning: the student is 1.20 points below the frozen baseline")
    assert all(word in text for word in there) and not any(word in text for word in absent)


def test_another_head_of_the_frozen_backbone_is_a_note():
    text = baseline_warning(97.0, BASELINE, {"learner": "frozen", "head": "ncm"})
    assert text == "note: --head ranpac is 1.20 points better on these validation images"


def test_forgetting_beside_that_of_all_images():
    known = SideResult(90.0, 5.0, ((90.0,),), forgetting_of_joint=4.5)
    line = forgetting_line(known)
    assert line is not None and "5.00 points" in line and "4.50" in line
    assert forgetting_line(dataclasses.replace(known, forgetting_of_joint=None)) is None
