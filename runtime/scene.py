"""Has the scene changed? A few microseconds a frame, on its raw pixels."""

from __future__ import annotations

import numpy as np

SIDE = 4
"""a frame is compared as SIDE x SIDE cells. On ImageNet pictures that tremble by 4 % of their side and are cut every 25
frames, 99 % of the differences to the frame before are below 8.0 grey levels, 99 % of those at cuts above 14.4; with
8 x 8 cells it is 12.2 and 17.6, which lies closer together (benchmarks/stream.py, 2026-11-21)"""
POINTS = 32
"about so many pixels a side are read: more cost time and say no more about so few cells"


class SceneChange:
    """Says for each frame of one stream whether it is to be asked again which prompts it wants.

    A frame is reduced to the mean green of 4 x 4 cells (green is most of the luma, and one third of the bytes). The
    mean absolute difference is taken to the frame before and to the frame of the last query; what the brightness of the
    whole picture does is left out. A frame is asked

    - when it differs from the frame before by more than `change`: a cut;
    - when it differs from the frame of the last query by more than `drift`: the camera has wandered away;
    - `every` frames after the last query in any case.

    The first two wait, after a query, until a frame has differed from the one before by less than `settled`, or `rest`
    frames have passed: a picture that jumps all the time is asked every `rest` frames, not always.

    Args:
        side: of the frames, uint8 (side, side, 3).
        every, rest: frames; every=0: only when the scene changes. change, drift: in grey levels of 0 to 255.
        settled: the same; None: half of `change`.
    """

    def __init__(
        self,
        side: int,
        every: int = 60,
        change: float = 10.0,
        drift: float = 30.0,
        settled: float | None = None,
        rest: int = 5,
    ) -> None:
        self.every, self.change, self.drift, self.rest = every, change, drift, rest
        self.settled = change / 2 if settled is None else settled
        self._cells = min(SIDE, side)
        step = max(1, side // POINTS)
        self._size = len(range(0, side, step)) // self._cells
        "points of a cell's side"
        self._points = slice(0, self._size * self._cells * step, step)
        self._seen = np.zeros((2, self._cells**2), np.float32)
        "cells of the frame before, and of the frame of the last query"
        self._age, self._calm, self._empty = 0, False, True
        self.jump = self.drifted = 0.0
        "difference of the last frame to the one before, and to that of the last query, in grey levels"

    def __call__(self, frame: np.ndarray) -> bool:
        """uint8 (side, side, 3), the next frame -> whether to query on it (later ones are compared with it)."""
        # Sums, no matrix products: numpy's BLAS beside the engine's own slowed the next pass by 0.15 ms (2026-11-21).
        n, size = self._cells, self._size
        green = frame[self._points, self._points, 1].astype(np.float32)
        rows = np.add.reduce(green.reshape(n, size, n * size), axis=1)
        cells = np.add.reduce(rows.reshape(n, n, size), axis=2).ravel() / size**2
        if self._empty:
            return self._query(cells)
        apart = cells - self._seen
        apart -= np.add.reduce(apart, axis=1, keepdims=True) / n**2
        self.jump, self.drifted = (np.add.reduce(np.abs(apart, out=apart), axis=1) / n**2).tolist()
        self._seen[0] = cells
        self._age += 1
        if self._calm or self._age >= self.rest:
            if self.jump > self.change or self.drifted > self.drift:
                return self._query(cells)
        elif self.jump < self.settled:
            self._calm = True
        return self._query(cells) if self.every and self._age >= self.every else False

    def _query(self, cells: np.ndarray) -> bool:
        self._seen[:] = cells
        self._age, self._calm, self._empty = 0, False, False
        return True

    def forget(self) -> None:
        """The next frame is a first one."""
        self._empty = True
