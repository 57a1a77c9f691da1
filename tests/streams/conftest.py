"""Cameras that are none, and videos of plain colours."""

from __future__ import annotations

import numpy as np
import pytest

RED, GREEN, BLUE = (0, 0, 255), (0, 255, 0), (255, 0, 0)
"as OpenCV has them"


def plain(colour, width=64, height=48):
    return np.full((height, width, 3), colour, np.uint8)


class Capture:
    """What OpenCV's VideoCapture is to its user."""

    def __init__(self, shots=(), open_=True, length=0.0, rate=0.0, times=()):
        self.shots, self.open, self.released, self.times = iter(shots), open_, False, iter(times)
        self.properties = {7: length, 5: rate}

    def isOpened(self):  # noqa: N802
        return self.open

    def get(self, number):
        return self.properties.get(number, 0.0)

    def read(self):
        assert not self.released
        shot = next(self.shots, None)
        self.properties[0] = next(self.times, 0.0)
        return shot is not None, shot

    def release(self):
        self.released = True


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self, stop_after=None):
        self.now, self.waits, self.stop_after = 100.0, [], stop_after

    def __call__(self):
        return self.now

    def pause(self, seconds):
        self.now += seconds
        if seconds:
            self.waits.append(round(seconds, 6))
        return self.stop_after is not None and len(self.waits) >= self.stop_after


@pytest.fixture
def capture():
    return Capture


@pytest.fixture
def clock():
    return Clock


@pytest.fixture
def colours():
    """{"red": a frame, ...} in BGR."""
    return {"red": plain(RED), "green": plain(GREEN), "blue": plain(BLUE)}


@pytest.fixture
def make_video(colours):
    """make(path, ["red", "red", "green"]) -> the path of a Motion JPEG of 25 frames a second."""
    cv2 = pytest.importorskip("cv2")

    def make(path, names, rate=25):
        height, width = colours["red"].shape[:2]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, (width, height))
        assert writer.isOpened()
        for name in names:
            writer.write(colours[name])
        writer.release()
        return path

    return make
