"""From a source to answers, one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import InputError, choose
from ..images import Preprocessing, UnreadableImage
from ..runtime.policy import Selector
from ..runtime.predict import predict
from .ahead import Ahead
from .folder import Folder
from .source import Frame, Opened, Source, frames, kind_of
from .video import Video

TAKE = {
    "auto": "newest of cameras and streams, all of files and folders",
    "all": "every frame: what comes faster than it is classified waits, and a camera's picture grows old",
    "newest": "the newest frame: those that come while one is classified are left out; a file plays at its speed",
}


class Show(AbstractContextManager["Show"], Protocol):
    """Something to look at what is watched, in a `with` block while it lasts."""

    def __call__(self, picture: np.ndarray, order: str, answer: dict[str, Any]) -> None:
        """The next frame, uint8 (H, W, 3), the order of its channels ("rgb" or "bgr"), and its answer."""


def source_of(name: str | int | Path, take: str = "auto", threads: int | None = None) -> tuple[Source, bool]:
    """The source of that name, and whether only its newest frames count. Raises: InputError."""
    choose("take", take, TAKE)
    source = str(name)
    kind = kind_of(source)
    newest = take == "newest" or (take == "auto" and kind in ("camera", "address", "pipeline"))
    return (Folder(Path(source)) if kind == "folder" else Video(source, kind, threads, paced=newest)), newest


def watch(
    student: Selector,
    source: Source,
    opened: Opened,
    newest: bool,
    task: int | None = None,
    count: int | None = None,
    on_change: bool = False,
    show: Show | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Generator[dict[str, Any], None, None]:
    """Classify frames until the source ends, or `count` of them are; an answer for each, see `answer`.

    Args:
        student: closed at the end, as `opened` is. source, newest: see `source_of`.
        task: only its classes compete, see `runtime.predict.predict`.
        on_change: only answers whose label, or whose `unknown`, is another than that of the one before.
        show: gets each frame that is classified. say: told what was lost, found and left out.

    Raises: InputError, as `frames`; for count < 1.
    """
    if count is not None and count < 1:
        raise InputError("the number of frames is wrong", got=count, expected="1 or more")
    begin, done, last = time.monotonic(), 0, None
    number = lost = 0
    try:
        with ExitStack() as stack:
            stack.enter_context(student)
            if show is not None:
                stack.enter_context(show)
            raw = stack.enter_context(Ahead(lambda pause: frames(source, opened, pause, say), newest=newest))
            for frame, pixels in _prepared(student.bundle.preprocessing, raw, newest, stack, say):
                if frame.found_again != lost:
                    student.forget()  # another scene, for all that is known
                found = answer(student, frame, pixels, task)
                found["left_out"] = frame.number - number - 1
                done, number, lost = done + 1, frame.number, frame.found_again
                if show is not None:
                    whole = isinstance(frame.shot.picture, np.ndarray)
                    show(frame.shot.picture if whole else pixels, "bgr" if whole else "rgb", found)  # type: ignore[arg-type]
                now = (found["label"], found["unknown"])
                if not on_change or now != last:
                    last = now
                    yield found
                if done == count:
                    return
    finally:
        seconds = max(time.monotonic() - begin, 1e-9)
        say(
            f"{done} frame(s) classified in {seconds:.1f} s ({done / seconds:.1f} a second), {number - done} left out, "
            f"lost and found {lost} time(s)"
        )


def answer(student: Selector, frame: Frame, pixels: np.ndarray, task: int | None = None) -> dict[str, Any]:
    """What `runtime.predict.predict` says about a frame, and which one it is.

    Returns: its prediction, with {"frame" (number), "at" (UTC), "seconds" (in a video file, else None), "image" (file
        of a folder, else None), "found_again" (how often the source was lost and found)}.
    """
    (prediction,) = predict(student, [pixels], task, decoded=True)["predictions"]
    return {
        "frame": frame.number,
        "at": datetime.fromtimestamp(frame.at, timezone.utc).isoformat(timespec="milliseconds"),
        "seconds": None if frame.shot.seconds is None else round(frame.shot.seconds, 3),
        **prediction,
        "image": str(frame.shot.picture) if isinstance(frame.shot.picture, Path) else None,
        "found_again": frame.found_again,
    }


def _prepared(
    preprocessing: Preprocessing, raw: Ahead[Frame], newest: bool, stack: ExitStack, say: Callable[[str], None]
) -> Iterable[tuple[Frame, np.ndarray]]:
    """Each frame with the pixels that the student sees. A picture that cannot be read is named and left out.

    Where every frame counts that is a third thread's work: decoding, scaling and computing overlap. Where the newest
    counts it is done when the student is free, for a frame that is scaled ahead is no longer the newest.
    """

    def scaled() -> Generator[tuple[Frame, np.ndarray], None, None]:
        for frame in raw:
            picture = frame.shot.picture
            try:
                if isinstance(picture, np.ndarray):
                    pixels = preprocessing.frame(picture, "bgr")
                else:
                    pixels = preprocessing.read(picture)
            except UnreadableImage as error:
                say(f"left out: {' '.join(str(error).split())}")
                continue
            yield frame, pixels

    if newest:
        return scaled()
    prepared = stack.enter_context(Ahead(lambda pause: scaled()))
    stack.callback(raw.stop)  # at the end first: the other thread may wait for it
    return prepared
