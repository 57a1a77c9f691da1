"""The gate lets pass what is equal and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cdl_edge.data import Split
from cdl_edge.errors import GateError
from cdl_edge.export.parity import TOLERANCE, compare, logits_of, sample, student_logits


@dataclass
class FakeBundle:
    classes: tuple[str, ...] = tuple("abcdefg")


class FakeRunner:
    """Answers with what torch says, plus an error in one logit of one image."""

    bundle = FakeBundle()

    def __init__(self, run, error: float) -> None:
        self.run_, self.error, self.calls = run, error, 0

    def infer(self, images: np.ndarray) -> np.ndarray:
        logits = student_logits(self.run_, images, 7)
        if self.calls == 0:
            logits[1, 2] += self.error
        self.calls += 1
        return logits


@dataclass
class FakeRun:
    student: object
    preprocessing: object


def check(run, runner, pixels):
    return compare(student_logits(run, pixels, 7), logits_of(runner, pixels))


@pytest.fixture
def run(lab):
    return FakeRun(lab.student("coda"), lab.preprocessing)


def test_the_tolerance_is_the_promised_one():
    assert TOLERANCE == 1e-4


@pytest.mark.slow
def test_equal_passes_and_says_what_was_compared(lab, run):
    parity = check(run, FakeRunner(run, 5e-5), lab.pixels(40))
    assert parity.to_json().keys() == {
        "max_abs_error", "mean_abs_error", "top1_agreement", "images", "tolerance", "judged",
    }  # fmt: skip
    assert 4e-5 < parity.max_abs_error < 1e-4
    assert 0 < parity.mean_abs_error < 1e-5
    assert (parity.images, parity.top1_agreement) == (40, 100.0)


@pytest.mark.parametrize("error", [3e-4, 100.0, float("nan"), float("inf")])
def test_one_wrong_logit_is_enough(lab, run, error):
    with pytest.raises(GateError, match=r"max .*mean .*40 real images.*1e-04"):
        check(run, FakeRunner(run, error), lab.pixels(40))


@pytest.mark.parametrize(("count", "expected"), [(10, 10), (97, 97), (100, 100), (500, 100)])
def test_sample_takes_different_images_from_the_whole_split(count, expected):
    items = np.zeros((100, 2, 2, 3), np.uint8)
    taken = sample(Split(items, np.arange(100)), count).labels
    assert len(set(taken.tolist())) == len(taken) == expected
    assert (taken.min(), taken.max()) == (0, 99)


def test_lower_precision_is_judged_by_its_mean_and_its_answers():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(200, 7)) * 3
    near = expected + rng.normal(size=expected.shape) * 1e-3
    near[3] += 5 * rng.normal(size=7)  # one image chose another entry
    parity = compare(expected, near, "fp16")
    assert parity.judged == "mean_abs_error" and parity.max_abs_error > 0.5 > parity.tolerance
    with pytest.raises(GateError, match="mean_abs_error"):
        compare(expected, expected + 0.5 * rng.normal(size=expected.shape), "fp16")
    shuffled = expected.copy()
    shuffled[:10] += np.eye(7)[np.argsort(expected[:10])[:, -2]] * 3  # 5 % other answers, a small mean
    with pytest.raises(GateError, match="at least 99 %"):
        compare(expected, shuffled, "fp16")
    with pytest.raises(GateError):
        compare(expected, near, "fp32")
