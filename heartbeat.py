"""What a command is at, said on stderr whenever nothing else has been said for a while."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from .files import first_process

SILENCE_S = 20.0
"after so long without a word a line is written"


class _Now:
    """What the process is at, as long steps tell it; one for the process, as its stderr is."""

    text, since = "", 0.0


def at(text: str) -> None:
    """Tell what is being done, for the line that a long silence brings. Cheap enough to be called at each step."""
    _Now.text, _Now.since = text, time.monotonic()


class Watched:
    """A text stream that knows when it was written to last, and which line that was."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.begun = self.written = time.monotonic()
        self.last, self.open = "", False
        "the last line; whether it has not ended yet, as that of a progress bar"

    def write(self, text: str) -> int:
        """Write to the stream, and remember when."""
        self.written = time.monotonic()
        lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
        if lines:
            self.last = lines[-1]
        if text:
            self.open = not text.endswith("\n")
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def beat(self, silence_s: float) -> None:
        """Write what the process is at, if nothing was written for so long."""
        now = time.monotonic()
        if now - self.written < silence_s:
            return
        doing = _Now.text if _Now.since > self.begun and _Now.text else self.last or "at work"
        last, silent = self.last, now - self.written
        self.write(f"{chr(10) * self.open}... {doing} (no other message for {silent:.0f} s)\n")
        self.last = last
        self.flush()


@contextlib.contextmanager
def heartbeat(silence_s: float = SILENCE_S) -> Iterator[None]:
    """While it is open no silence on stderr is longer than `silence_s`, of the first of several processes."""
    if not first_process():
        yield
        return
    before, over = sys.stderr, threading.Event()
    watched = Watched(before)

    def watch() -> None:
        while not over.wait(silence_s / 8):
            watched.beat(silence_s)

    thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
    sys.stderr = watched
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sys.stderr = before
