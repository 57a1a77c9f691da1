"""What the endpoints share: the handle, the limits, the counts, and the way from a coroutine to a worker thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.requests import Request

from ... import __version__
from ..bundle import MANIFEST, open_bundle
from ..handle import Handle, version_name
from ..runner import Runner
from .body import Limits
from .metrics import Metrics
from .refuse import Refused

Result = TypeVar("Result")


@dataclass
class Server:
    """State of the application, as request.app.state.server."""

    handle: Handle
    source: Path
    "the bundle on disk, where packs are installed"
    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    "what packs are installed with; None: only from this machine"
    public_key: Path | None = None
    "packs have to be signed with its private half"
    name: str = ""
    "of the model in the Open Inference Protocol: stays, whatever is installed; empty: the name of the folder"
    metrics: Metrics = field(default_factory=Metrics)
    changing: threading.Lock = field(default_factory=threading.Lock)
    "held while the bundle on disk and the one in the handle may differ"

    def __post_init__(self) -> None:
        self.name = self.name or self.source.resolve().name

    async def compute(self, work: Callable[[Runner], Result]) -> tuple[Result, dict[str, Any]]:
        """Do `work` with the current version on a thread of the handle; also who did it and how long it took.

        Raises: Busy, Refused (504) after limits.answer_s, and what `work` raises.
        """
        begin = time.perf_counter()

        def timed(runner: Runner) -> tuple[Result, dict[str, Any]]:
            start = time.perf_counter()
            result = work(runner)
            end = time.perf_counter()
            milliseconds = {"waited": round((start - begin) * 1e3, 3), "computed": round((end - start) * 1e3, 3)}
            return result, {"bundle": runner.bundle.name, "version": version_name(runner.bundle), "ms": milliseconds}

        future = self.handle.submit(timed)
        try:
            with anyio.fail_after(self.limits.answer_s):
                answer = await asyncio.wrap_future(future)
        except TimeoutError:
            seconds = f"{self.limits.answer_s:g} s"
            raise Refused(504, "no answer in time", got=f"none after {seconds}", fix="look at /health") from None
        self.metrics.predicted((time.perf_counter() - begin) * 1e3)
        return answer

    def describe(self) -> dict[str, Any]:
        """What answers now, for /health and the page."""
        runner = self.handle.runner
        bundle = runner.bundle
        return {
            "name": self.name,
            "bundle": bundle.name,
            "version": version_name(bundle),
            "classes": len(bundle.classes),
            "tasks": len(bundle.tasks),
            "side": bundle.preprocessing.size,
            "learner": bundle.manifest.get("learner"),
            "selection": bundle.selection,
            "runner": runner.describe(),
            "cdl_edge": __version__,
        }

    def exchange(self) -> dict[str, Any]:
        """Put in what lies on disk now; see `Handle.swap`. The caller holds `changing`."""
        done = False
        try:
            result = self.handle.swap(self.source)
            done = True
        finally:
            self.metrics.swap(done)
        return result

    def stamp(self) -> tuple[int, int] | None:
        """Changes whenever another version is put on the disk; None in the moment when there is none."""
        folder = self.source / "current"
        try:
            found = ((folder if folder.exists() else self.source) / MANIFEST).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def follow(self) -> None:
        """Put in what lies on disk if it is another version than the one that answers. Raises: InputError, Busy."""
        with self.changing:
            found = version_name(open_bundle(self.source, verify=False))
            if found != version_name(self.handle.runner.bundle):
                self.exchange()


def server_of(request: Request) -> Server:
    """The state of the application that got this request."""
    server: Server = request.app.state.server
    return server
