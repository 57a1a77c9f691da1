"""A folder that is being filled: each picture once it is whole, and again when it was written anew."""

from __future__ import annotations

from collections import Counter, deque
from contextlib import suppress
from pathlib import Path

from ..errors import InputError
from ..folders import pictures_below
from .ahead import Pause
from .source import Opened, Shot

LOOK_S = 0.2
"between two looks; a file is whole when it has not changed from one to the next"

Stamp = tuple[int, int]
"of a file: when it was written, in ns, and its size"


class Folder:
    """The pictures below a folder: those that are there, oldest first, then those that come.

    Nothing else than names, times and sizes is asked of the system: a folder that is mounted from elsewhere tells of no
    changes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._seen: dict[Path, Stamp] = {}
        "what was given: only of files that are still there, or were when there were any"

    def open(self) -> Opened:
        """Open the folder. Raises: InputError where there is none."""
        if not self.path.is_dir():
            raise InputError(f"{self.path}: no such folder")
        return _Look(self.path, self._seen)

    def ends(self, opened: Opened) -> bool:
        """False: a folder that is gone may be mounted again."""
        return False


class _Look:
    def __init__(self, path: Path, seen: dict[Path, Stamp]) -> None:
        self._path, self._seen = path, seen
        self._before: dict[Path, Stamp] = {}
        self._ready: deque[Path] = deque()

    def read(self, pause: Pause) -> Shot | None:
        """The next picture that is whole; None once the folder is gone."""
        while not self._ready:
            if not self._path.is_dir():
                return None
            self._look()
            if not self._ready and pause(LOOK_S):
                return None
        return Shot(self._ready.popleft())

    def _look(self) -> None:
        now: dict[Path, Stamp] = {}
        for path in pictures_below(self._path, Counter(), named=False):
            with suppress(OSError):  # gone meanwhile
                found = path.stat()
                now[path] = (found.st_mtime_ns, found.st_size)
        if now:  # else a file system may have been taken away: its folder stays, and is empty until it is back
            for path in [p for p in self._seen if p not in now]:
                del self._seen[path]
        fresh = {p: s for p, s in now.items() if self._seen.get(p) != s}
        whole = [p for p, s in fresh.items() if self._before.get(p) == s]
        self._before = fresh
        for path in sorted(whole, key=lambda p: (fresh[p], p)):
            self._seen[path] = fresh[path]
            self._ready.append(path)

    def close(self) -> None:
        """Nothing is held."""
