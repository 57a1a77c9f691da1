"""Cuts, drift, rest: on pictures whose differences can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.runtime.scene import SceneChange


def grey(level: int, side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


def asked(detector: SceneChange, levels: list[int]) -> list[int]:
    return [i for i, level in enumerate(levels) if detector(grey(level))]


@pytest.mark.parametrize("side", [1, 5, 8, 32, 224])
def test_differences(side):
    detector = SceneChange(side)
    assert detector(grey(100, side)), "the first frame"
    assert not detector(grey(110, side))
    assert (detector.jump, detector.drifted) == (10, 10)
    assert not detector(grey(90, side))
    assert (detector.jump, detector.drifted) == (20, 10)


def test_the_whole_picture_is_looked_at():
    detector, rng = SceneChange(32), np.random.default_rng(0)
    frame = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    detector(frame)
    for rows, columns in ((slice(0, 16), slice(0, 16)), (slice(16, 32), slice(16, 32))):
        changed = frame.copy()
        changed[rows, columns] = 255 - changed[rows, columns]
        detector.forget()
        detector(frame)
        detector(changed)
        points = np.abs(changed[2::4, 2::4, 1].astype(int) - frame[2::4, 2::4, 1]).mean()
        assert detector.jump == pytest.approx(points) and points > 10


def test_a_cut_is_seen_at_once():
    assert asked(SceneChange(32, every=0), [50] * 4 + [100] * 4) == [0, 4]


def test_the_reference_is_a_copy():
    detector, frame = SceneChange(32, every=0), grey(50)
    detector(frame)
    detector(frame)
    frame[:] = 100  # a camera writes into the same memory
    assert detector(frame)


def test_a_slow_drift_is_seen_in_the_end():
    # 8 levels a frame are no cut; 64 away from the frame of the query are too far.
    assert asked(SceneChange(32, every=0), [100 + 8 * i for i in range(12)]) == [0, 8]


def test_a_refresh_in_any_case():
    assert asked(SceneChange(32, every=4), [50] * 10) == [0, 4, 8]


def test_a_picture_that_jumps_all_the_time_is_asked_now_and_then():
    flashing = [50, 150] * 10
    assert asked(SceneChange(32, every=0, rest=5), flashing) == [0, 5, 10, 15]
    # Once it has come to rest a cut is seen at once again.
    assert asked(SceneChange(32, every=0, rest=9), [50, 150, 150, 50, 50]) == [0, 3]


def test_forget():
    detector = SceneChange(32, every=0)
    assert asked(detector, [50, 50]) == [0]
    detector.forget()
    assert asked(detector, [50, 50]) == [0]
