"""Cameras, video files, streams and pipelines, decoded by OpenCV."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from ..errors import InputError
from ..jetson import on_jetson
from .ahead import Pause
from .source import EXPECTED, Opened, Shot

TIMEOUT_MS = 10_000
"for which a stream may send nothing, before it is lost"
POSITION_MS = 0
"OpenCV's CAP_PROP_POS_MSEC: when in the video the last frame is shown"
FRAMES_EACH_S = 25.0
"of a video that does not say how fast it is"


class Video:
    """What OpenCV can open.

    Args:
        source: the number or device of a camera, a path, an address, or a GStreamer pipeline. kind: see `kind_of`.
        threads: of the decoder; None: as many as it likes.
        paced: a file gives its frames no faster than it plays.
        capture: makes an OpenCV capture; None: OpenCV does.
    """

    def __init__(
        self,
        source: str,
        kind: str,
        threads: int | None = None,
        paced: bool = False,
        capture: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"camera {source}" if source.isdigit() else without_password(source)
        self.kind, self._paced, self._clock = kind, paced and kind == "file", clock
        self._capture = capture or (lambda: opened_by_opencv(source, kind, threads))

    def open(self) -> Opened:
        """Open it with OpenCV. Raises: InputError where that fails."""
        capture = self._capture()
        if not capture.isOpened():
            capture.release()
            fix = {
                "camera": "is it plugged in, and does no other program have it? ls /dev/video*",
                "address": "is it reached from here? ffplay shows whether it is",
                "pipeline": "try it with gst-launch-1.0; it ends in: ! videoconvert ! video/x-raw,format=BGR ! appsink",
            }.get(self.kind, "play it with another program; convert it to H.264 in MP4")
            raise InputError(
                f"{self.name}: cannot be opened",
                got="no video in it" if self.kind == "file" else f"no {self.kind}",
                expected=EXPECTED,
                fix=fix,
            )
        return _Reading(capture, self._paced, self._clock)

    def ends(self, opened: Opened) -> bool:
        """Of a file, also one behind an address: it knows how many frames it has."""
        return isinstance(opened, _Reading) and (self.kind == "file" or opened.length > 0)


class _Reading:
    """An open capture."""

    def __init__(self, capture: Any, paced: bool, clock: Callable[[], float]) -> None:
        self._capture, self._paced, self._clock = capture, paced, clock
        number, rate = 7, 5  # CAP_PROP_FRAME_COUNT, CAP_PROP_FPS
        self.length = max(0.0, float(capture.get(number)))
        "frames, as the file says; 0 for what has no end"
        rate_found = float(capture.get(rate))
        self._each_s = 1 / (rate_found if 0 < rate_found < 1000 else FRAMES_EACH_S)
        self._seconds, self._begin = -self._each_s, clock()

    def read(self, pause: Pause) -> Shot | None:
        """The next frame; None where there is none."""
        found, pixels = self._capture.read()
        if not found or pixels is None:
            return None
        # Phones film at a rate that changes: each frame has its own time. 0 where OpenCV knows none.
        told = float(self._capture.get(POSITION_MS)) / 1000
        self._seconds = told if told > max(self._seconds, 0.0) else self._seconds + self._each_s
        if pause(max(0.0, self._begin + self._seconds - self._clock()) if self._paced else 0):
            return None
        seconds = self._seconds if self.length > 0 else None
        return Shot(pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1), seconds)

    def close(self) -> None:
        """Give the device or the connection back."""
        self._capture.release()


def opened_by_opencv(source: str, kind: str, threads: int | None) -> Any:
    """An OpenCV capture, which may not be open. Raises: InputError where this OpenCV lacks what a pipeline needs."""
    cv2 = opencv()
    if kind == "pipeline":
        if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
            raise InputError(
                "this OpenCV has no GStreamer",
                got=f"{cv2.__version__} in {os.path.dirname(cv2.__file__)}",
                expected="the system's: Debian, Ubuntu and JetPack build it with GStreamer",
                fix="sudo apt-get install python3-opencv, and make the environment with: python3 -m venv "
                "--system-site-packages",
            )
        return cv2.VideoCapture(source, cv2.CAP_GSTREAMER)
    if kind == "camera":
        return cv2.VideoCapture(int(source) if source.isdigit() else source)
    options = [] if threads is None else [cv2.CAP_PROP_N_THREADS, threads]
    if kind == "address":
        options += [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS]
    return cv2.VideoCapture(source, cv2.CAP_FFMPEG, options)


def opencv() -> Any:
    """The module cv2, quiet: what is wrong is said here, once. On a Jetson it is JetPack's, with its decoders.

    Raises: ModuleNotFoundError, of the extra `watch`; InputError on a Jetson, where pip has none that fits.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ModuleNotFoundError as error:
        if on_jetson():
            raise InputError(
                "OpenCV cannot be imported",
                got=str(error),
                expected="JetPack's, which decodes in hardware",
                fix="sudo apt-get install -y python3-opencv, and make the environment with: python3 -m venv "
                "--system-site-packages",
            ) from error
        raise
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def without_password(source: str) -> str:
    """An address as messages may have it."""
    if "://" not in source or " ! " in source:
        return source
    parts = urlsplit(source)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
