"""Where frames come from: what a source is, which kind a name means, and how one that was lost is found again."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import InputError, command_line
from ..images import EXTENSIONS
from .ahead import Pause

FIRST_S, LONGEST_S = 0.5, 30.0
"wait before the first attempt to find a source again, and at most: it doubles from one to the next"
EXPECTED = "the number of a camera, a video file, an address (rtsp://, http://), a GStreamer pipeline, or a folder"


@dataclass(frozen=True)
class Shot:
    """One picture or frame, as a source gives it."""

    picture: np.ndarray | Path
    "a frame, uint8 BGR (H, W, 3), or a picture file"
    seconds: float | None = None
    "where it is in a video file"


@dataclass(frozen=True)
class Frame:
    """A shot, and what is known about it."""

    shot: Shot
    number: int
    "of all that came from this source, from 1 on, those included that nobody looked at"
    at: float
    "when it came, in seconds since 1970"
    found_again: int
    "how often the source had been lost before"


class Opened(Protocol):
    """A source that gives shots. One thread uses it."""

    def read(self, pause: Pause) -> Shot | None:
        """The next one; None at the end, when the source is lost, or when `pause` says that all is to end."""

    def close(self) -> None:
        """Release what the source holds, as a device or a connection."""


class Source(Protocol):
    """Something that can be opened, and opened again."""

    name: str
    "for messages: without a password"

    def open(self) -> Opened:
        """Open the source. Raises: InputError where it cannot be opened."""

    def ends(self, opened: Opened) -> bool:
        """Whether the end is the end: of a file. Otherwise the source was lost, and may be found again."""


def frames(
    source: Source,
    opened: Opened,
    pause: Pause,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Frame, None, None]:
    """All frames of a source, until it ends or `pause` says so. A lost one is looked for without end.

    opened: what `source.open` gave. say: told when it is lost, and when it is found.

    Raises: InputError for a source that ends without a frame.
    """
    number = found_again = 0
    lost_at: float | None = None
    wait_s = FIRST_S
    while True:
        with closing(opened):
            while (shot := opened.read(pause)) is not None:
                if lost_at is not None:
                    say(f"{source.name}: found again after {clock() - lost_at:.1f} s")
                    found_again, lost_at, wait_s = found_again + 1, None, FIRST_S
                number += 1
                yield Frame(shot, number, time.time(), found_again)
            ended = source.ends(opened)
        if ended:
            if number == 0:
                raise InputError(f"{source.name}: no frame in it", got="the end", expected="a video", fix="play it")
            return
        told = lost_at is not None
        lost_at = clock() if lost_at is None else lost_at
        while True:
            if pause(wait_s):
                return
            if not told:  # behind the wait: a source that was told to stop is not lost
                say(f"{source.name}: lost after {number} frame(s); looking for it again")
                told = True
            wait_s = min(2 * wait_s, LONGEST_S)
            try:
                opened = source.open()
                break
            except InputError:  # not yet
                continue


def kind_of(source: str) -> str:
    """camera | pipeline | address | folder | file. Raises: InputError for a name that is none of them."""
    if source.isascii() and source.isdigit():
        return "camera"
    if " ! " in source:
        return "pipeline"
    if "://" in source:
        return "address"
    try:
        mode = os.stat(source).st_mode
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source}: no such source", got=getattr(error, "strerror", None) or str(error), expected=EXPECTED
        ) from error
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISCHR(mode):  # /dev/video0
        return "camera"
    if Path(source).suffix.lower() in EXTENSIONS - {".gif"}:
        raise InputError(f"{source}: one picture", expected=EXPECTED, fix=command_line("predict", "BUNDLE", source))
    return "file"
