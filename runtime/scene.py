"""Has the scene changed? A few microseconds a frame, on its raw pixels."""

from __future__ import annotations

from operator import sub

import numpy as np

POINTS = 8
"a frame is looked at in POINTS x POINTS places: 16 x 16 separate cuts from trembling no better"


class SceneChange:
    """Says for each frame of one stream whether it is to be asked again which prompts it wants.

    The green of 8 x 8 evenly spaced pixels is compared (most of the luma, without touching the rest of the picture):
    the mean absolute difference to the frame before, and to the frame of the last query. A frame is asked

    - when it differs from the frame before by more than `change`: a cut;
    - when it differs from the frame of the last query by more than `drift`: the camera has wandered away, the light
      is another one;
    - `every` frames after the last query in any case.

    The first two wait, after a query, until a frame has differed from the one before by less than `settled`, or `rest`
    frames have passed: a picture that jumps all the time is asked every `rest` frames, not always.

    The defaults stand between trembling and cuts of ImageNet pictures (benchmarks/stream.py, 2026-11-21): 99.9 % of the
    differences to the frame before are below 27 (trembling by 2 % of the side; by 4 %: 99 % below 30), 99 % of those
    at cuts above 38; 99 % of the differences to the frame of the last query are below 57. Means of 4 x 4 cells separate
    them as well and take twice the time.

    Args:
        side: of the frames, uint8 (side, side, 3).
        every, rest: frames; every=0: only when the scene changes. change, drift: in grey levels of 0 to 255.
        settled: the same; None: half of `change`.
    """

    def __init__(
        self,
        side: int,
        every: int = 60,
        change: float = 30.0,
        drift: float = 60.0,
        settled: float | None = None,
        rest: int = 5,
    ) -> None:
        self.every, self.change, self.drift, self.rest = every, change, drift, rest
        self.settled = change / 2 if settled is None else settled
        points = min(POINTS, side)
        step = side // points
        self._points = slice(step // 2, step * points, step)
        self._scale = 1 / (points * points)
        self._before: list[int] = []
        self._asked: list[int] = []
        "green of the frame before, and of the frame of the last query"
        self._age, self._calm = 0, False
        self.jump = self.drifted = 0.0
        "difference of the last frame to the one before, and to that of the last query, in grey levels"

    def __call__(self, frame: np.ndarray) -> bool:
        """uint8 (side, side, 3), the next frame -> whether to query on it (later ones are compared with it)."""
        # No array operations: alone they take as long (4 us), but between two calls of an engine that has the caches
        # for itself each new one costs several times that.
        green = frame[self._points, self._points, 1].ravel().tolist()
        if not self._before:
            return self._query(green)
        self.jump = sum(map(abs, map(sub, green, self._before))) * self._scale
        self.drifted = sum(map(abs, map(sub, green, self._asked))) * self._scale
        self._before = green
        self._age += 1
        if self._calm or self._age >= self.rest:
            if self.jump > self.change or self.drifted > self.drift:
                return self._query(green)
        elif self.jump < self.settled:
            self._calm = True
        return self._query(green) if self.every and self._age >= self.every else False

    def _query(self, green: list[int]) -> bool:
        self._before = self._asked = green
        self._age, self._calm = 0, False
        return True

    def forget(self) -> None:
        """The next frame is a first one."""
        self._before = []
