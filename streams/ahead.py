"""Made ahead: a thread computes the next items while the last one is being used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Pause = Callable[[float], bool]
"waits for so many seconds, or until all is to end: True then"

LEAVE_S = 2.0
"how long `close` waits for the thread; a call of a driver may hang for longer, and ends with the process"


class Ahead(Generic[Item]):
    """An iterator whose items are made in a thread of its own, in their order. To be used in a `with` block.

    What the making raises is raised to the reader, after the items that were made before.

    Args:
        make: gets a Pause and returns a generator of the items, which is closed in its thread.
        depth: items that may wait to be taken; the making waits then.
        newest: only the last item waits, and a newer one takes its place: the making never waits.
    """

    def __init__(
        self, make: Callable[[Pause], Generator[Item, None, None]], depth: int = 2, newest: bool = False
    ) -> None:
        self._make, self._depth, self._newest = make, 1 if newest else depth, newest
        self._made: deque[Item] = deque(maxlen=self._depth)
        self._change = threading.Condition()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._done = False
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)

    def __enter__(self) -> Ahead[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._change:
            self._change.wait_for(lambda: self._made or self._done or self._stopped.is_set())
            if self._made and not self._stopped.is_set():
                item = self._made.popleft()
                self._change.notify_all()
                return item
        if self._error is not None and not self._stopped.is_set():
            raise self._error
        raise StopIteration

    def stop(self) -> None:
        """No more items, for whoever waits for one: on either side."""
        with self._change:
            self._stopped.set()
            self._change.notify_all()

    def close(self) -> None:
        """End the thread, wherever it waits; a second call does nothing."""
        self.stop()
        self._thread.join(LEAVE_S)

    def _run(self) -> None:
        try:
            items = self._make(self._stopped.wait)
            try:
                for item in items:
                    if not self._put(item):
                        break
            finally:
                items.close()
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise
        finally:
            with self._change:
                self._done = True
                self._change.notify_all()

    def _put(self, item: Item) -> bool:
        """False: nobody wants it any more."""
        with self._change:
            if not self._newest:
                self._change.wait_for(lambda: len(self._made) < self._depth or self._stopped.is_set())
            if self._stopped.is_set():
                return False
            self._made.append(item)
            self._change.notify_all()
            return True
