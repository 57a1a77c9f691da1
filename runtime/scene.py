"""Has the scene changed? A few microseconds a frame, on its raw pixels. And: are two pictures of one scene?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import sub
from typing import Any

import numpy as np
from PIL import Image

POINTS = 8
"a frame is looked at in POINTS x POINTS places: 16 x 16 separate cuts from trembling no better"
SAME_BITS, SAME_COLOUR, NOISE = 6, 30, 2
"""bits of 64, and grey levels of the mean colour, by which two pictures of one scene may differ; a step of NOISE grey
levels between two cells is none"""


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
        """Treat the next frame as the first one of a stream."""
        self._before = []


@dataclass(frozen=True)
class Scene:
    """What a picture looks like from far away."""

    bits: int
    "64 of them: where the picture, in 8 rows of 9 cells, gets brighter to the right (dHash)"
    colour: tuple[int, int, int]
    "mean of red, green, blue"

    @classmethod
    def of(cls, pixels: np.ndarray) -> Scene:
        """The scene that pixels uint8 (S, S, 3) show."""
        cells = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
        bits = (np.diff(cells, axis=1) > NOISE).ravel()
        red, green, blue = (int(c) for c in pixels.mean((0, 1)).round())
        return cls(int.from_bytes(np.packbits(bits).tobytes(), "big"), (red, green, blue))

    def same(self, other: Scene) -> bool:
        """Whether two scenes are likely the same thing in the same light."""
        near = max(abs(a - b) for a, b in zip(self.colour, other.colour, strict=True)) <= SAME_COLOUR
        return near and (self.bits ^ other.bits).bit_count() <= SAME_BITS

    def to_json(self) -> dict[str, Any]:
        """The scene as plain JSON values, for `from_json`."""
        return {"bits": f"{self.bits:016x}", "colour": list(self.colour)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Scene:
        """Raises: ValueError, KeyError or TypeError for anything but what `to_json` gives."""
        red, green, blue = (int(c) for c in document["colour"])
        return cls(int(document["bits"], 16), (red, green, blue))
