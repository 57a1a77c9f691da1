"""The one logger: steps and warnings that a long command tells on its way. Results and errors do not go through it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LineFormatter(logging.Formatter):
    """The message as it is, a warning with the word in front."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        text = record.getMessage()
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


class _Listeners(threading.local):
    """Of each thread its own, so that callers side by side do not get each other's lines."""

    def __init__(self) -> None:
        self.open: list[Callable[[str], None]] = []


_listeners = _Listeners()
_elsewhere: list[Callable[[str], None]] = []
"for threads of which nobody listens to the lines"


class _ToListener(logging.Handler):
    """Gives each line to whoever listens in its thread; of several, to the one that came last."""

    def emit(self, record: logging.LogRecord) -> None:
        if listening := _listeners.open or _elsewhere:
            listening[-1](self.format(record))


LOG = logging.getLogger("cdl_edge")
LOG.setLevel(logging.INFO)
_handler = _ToListener()
_handler.setFormatter(LineFormatter())
LOG.addHandler(_handler)


@contextmanager
def told(tell: Callable[[str], None] | None, threads: bool = False) -> Iterator[None]:
    """While open, `tell` gets every line that this thread logs; None: whoever got them before.

    threads: and the lines of all other threads that have no listener of their own, as those of a server.
    """
    if tell is None:
        yield
        return
    _listeners.open.append(tell)
    if threads:
        _elsewhere.append(tell)
    try:
        yield
    finally:
        _listeners.open.pop()
        if threads:
            _elsewhere.remove(tell)
