"""What the endpoints share: the live model, the limits, the counts, and the way from a coroutine to a worker thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response

from .. import __version__
from ..artefacts.bundle import open_bundle
from ..artefacts.layout import MANIFEST
from ..decoders import Decoders
from ..errors import InputError
from ..log import LOG
from ..runtime.runner import Runner
from ..runtime.selftest import extremes, prove_answers
from .body import BodyReader, Limits, Uploads
from .collect import Collection
from .live_model import Busy, LiveModel, version_name
from .refuse import Refused
from .request_metrics import RequestMetrics

Result = TypeVar("Result")


@dataclass
class Server:
    """State of the application, as request.app.state.server."""

    live: LiveModel
    source: Path
    "the bundle on disk, where packs are installed"
    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    "what packs are installed with; None: only through the Unix socket"
    public_key: Path | None = None
    "packs have to be signed with its private half"
    allow_unsigned: bool = False
    "where no key is given or pinned: take packs without a signature"
    install_s: float = 0.0
    "until a pack is unpacked and has passed its self-test; 0: as long as the live model has for it"
    name: str = ""
    "of the model in the Open Inference Protocol: stays, whatever is installed; empty: the name of the folder"
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    changing: threading.Lock = field(default_factory=threading.Lock)
    "held while the bundle on disk and the one that answers may differ"
    judging: threading.Lock = field(default_factory=threading.Lock)
    "held while pictures of a class are judged that nobody has taught yet"
    collection: Collection | None = None
    "where pictures worth keeping go, where somebody asked for it; whoever makes this closes it"
    decoders: Decoders = field(default_factory=Decoders)
    "where pictures are decoded; whoever makes this closes them"
    answered_at: float = 0.0
    "when a picture was classified last"

    def __post_init__(self) -> None:
        self.name = self.name or self.source.resolve().name
        self.uploads = Uploads(self.limits.held_bytes)
        self.install_s = self.install_s or self.live.load_s

    @contextlib.contextmanager
    def reader(self, request: Request) -> Iterator[BodyReader]:
        """Open a reader of a request's body; what it has read is counted until the end."""
        with self.uploads.one() as upload:
            yield BodyReader(request, self.limits, self.uploads, upload)

    def place(self) -> dict[str, Any]:
        """Arguments of updates.packs: the bundle, and how it is run."""
        return {"bundle": str(self.source.absolute()), "backend": self.live.backend, "threads": self.live.threads}

    async def compute(self, work: Callable[[Runner], Result]) -> tuple[Result, dict[str, Any]]:
        """Do `work` with the current version on a thread of the live model; also who did it and how long it took.

        Raises: Busy, Refused (504) after limits.answer_s, and what `work` raises.
        """
        begin = time.perf_counter()

        def timed(runner: Runner) -> tuple[Result, dict[str, Any]]:
            start = time.perf_counter()
            result = work(runner)
            end = time.perf_counter()
            milliseconds = {"waited": round((start - begin) * 1e3, 3), "computed": round((end - start) * 1e3, 3)}
            return result, {"bundle": runner.bundle.name, "version": version_name(runner.bundle), "ms": milliseconds}

        answer = await self._within(self.live.submit(timed))
        self.metrics.predicted((time.perf_counter() - begin) * 1e3)
        return answer

    async def _within(self, future: Future[Result]) -> Result:
        try:
            with anyio.fail_after(self.limits.answer_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            seconds = f"{self.limits.answer_s:g} s"
            raise Refused(504, "no answer in time", got=f"none after {seconds}", fix="look at /health") from None

    async def probe(self) -> None:
        """Ask itself, as a client would, and keep for /health whether an answer came."""
        try:
            future = self.live.submit(lambda runner: prove_answers(runner, extremes(runner)[:1]))
        except Busy:  # too much is asked: no sign of a fault
            return
        begin = time.monotonic()
        try:
            await self._within(future)
        except InputError as error:
            if self.answered_at < begin:  # nobody else got an answer meanwhile
                self.live.failing = str(error).splitlines()[0]
                return
        self.live.failing = None

    def describe(self) -> dict[str, Any]:
        """What answers now, for /health and the page."""
        runner = self.live.runner
        bundle = runner.bundle
        return {
            "name": self.name,
            "bundle": bundle.name,
            "version": version_name(bundle),
            "classes": len(bundle.classes),
            "tasks": len(bundle.tasks),
            "side": bundle.preprocessing.size,
            "learner": bundle.manifest.learner,
            "selection": bundle.selection,
            "runner": runner.describe(),
            "cdl_edge": __version__,
        }

    def exchange(self) -> dict[str, Any]:
        """Put in what lies on disk now; see `LiveModel.swap`. The caller holds `changing`."""
        done = False
        try:
            result = self.live.swap(self.source)
            done = True
        finally:
            self.metrics.swap(done)
        classes = len(self.live.runner.bundle.classes)
        change = f"{result['previous']} -> {result['version']}"
        LOG.info(f"{self.name}: version {change} answers now: {classes} classes, after {result['seconds']} s")
        return result

    def stamp(self) -> frozenset[tuple[str, int, int, int]] | None:
        """Changes whenever a version on the disk does; None in the moment when there is none.

        Of all files: those of a bundle that is copied over come one after the other, often the manifest before others.
        """
        folder = self.source / "current"
        try:
            with os.scandir(folder if folder.exists() else self.source) as entries:
                found = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        except OSError:
            return None
        if MANIFEST not in found:
            return None
        return frozenset((name, about.st_ino, about.st_mtime_ns, about.st_size) for name, about in found.items())

    def follow(self) -> None:
        """Put in what lies on disk if it is another version than the one that answers.

        Raises: InputError, and Busy while somebody else changes it, who puts it in.
        """
        if self._fresh():  # asked without the lock: who sends one change after another is not refused because of a look
            return
        if not self.changing.acquire(blocking=False):
            raise Busy("another change of the bundle is going on")
        try:
            if not self._fresh():
                self.exchange()
        finally:
            self.changing.release()

    def _fresh(self) -> bool:
        return version_name(open_bundle(self.source, verify=False)) == version_name(self.live.runner.bundle)


def server_of(request: Request) -> Server:
    """The state of the application that got this request."""
    server: Server = request.app.state.server
    return server


def answered(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A document as JSON, for a client to read.

    Half of a surrogate pair, which JSON may hold and UTF-8 may not, is written as JSON's own escape.

    Raises: ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "backslashreplace"), status, headers, "application/json")
