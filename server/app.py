"""The application: paths, errors, counts, start and end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor, wait

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InputError
from ..log import LOG
from . import admin, answers, gallery, request_metrics, teach
from .live_model import Busy
from .notify import notify, watchdog_s
from .page import page
from .refuse import Refused
from .server import Server, answered, server_of

WATCH_S = 1.0
"how often --watch looks at the bundle"
PROBE_S = 10.0
"how often the server asks itself where nobody else does"
BUGS = logging.getLogger("uvicorn.error")
KINDS = {401: "denied", 403: "denied", 404: "not_found", 405: "not_found", 408: "timeout", 413: "too_large"}
KINDS |= {415: "content_type", 503: "busy", 504: "timeout"}


def build_app(server: Server, watch: bool = False) -> Starlette:
    """The ASGI application around a live model, which it closes at its end.

    watch: look every WATCH_S for another version at server.source, and put it in.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            if watch:
                tasks.start_soon(_watch, server)
            tasks.start_soon(_probing, server)
            if period := watchdog_s():
                tasks.start_soon(_guarded, server, period)
            notify("READY=1")
            yield
            notify("STOPPING=1")
            tasks.cancel_scope.cancel()
        await anyio.to_thread.run_sync(server.live.close)

    model = "/v2/models/{name}"
    routes = [
        Route("/", page),
        Route("/predict", answers.predict, methods=["POST"]),
        Route("/batch", answers.batch, methods=["POST"]),
        Route("/health", health),
        Route("/classes", answers.classes),
        Route("/metrics", prometheus),
        Route("/packs", admin.listed),
        Route("/packs", admin.install, methods=["POST"]),
        Route("/packs/rollback", admin.rollback, methods=["POST"]),
        Route("/enrolments", teach.enrolments),
        Route("/enrolments", teach.enrol_class, methods=["POST"]),
        Route("/enrolments/judge", teach.judge, methods=["POST"]),
        Route("/enrolments/remove", teach.remove, methods=["POST"]),
        Route("/collected", gallery.collected),
        Route("/collected/picture", gallery.collected_picture),
        Route("/collected/sort", gallery.sort_collected, methods=["POST"]),
        Route("/collected/discard", gallery.discard_collected, methods=["POST"]),
        Route("/v2", answers.about),
        Route("/v2/health/live", answers.live),
        Route("/v2/health/ready", answers.ready),
        Route("/v2/models/stats", answers.statistics),
        Route("/v2/repository/index", answers.index, methods=["POST"]),
    ]
    for path in (model, model + "/versions/{version}"):
        routes += [
            Route(path, answers.model),
            Route(path + "/ready", answers.ready),
            Route(path + "/config", answers.configuration),
            Route(path + "/stats", answers.statistics),
            Route(path + "/infer", answers.infer, methods=["POST"]),
        ]
    handlers = {InputError: refused, Busy: busy, HTTPException: unknown, ClientDisconnect: gone, Exception: failed}
    app = Starlette(routes=routes, middleware=[Middleware(Counting, server=server)], lifespan=lifespan)
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.state.server = server
    app.router.redirect_slashes = False  # it would send a client to whatever host the client named
    return app


async def health(request: Request) -> Response:
    """GET /health: 200, or 503 when no answers come; what answers and how fast it is."""
    server = server_of(request)
    found = server.live.health()
    document = {**found, "model": server.describe(), "latency": server.metrics.latency()}
    return answered(document, 200 if found["status"] == "ok" else 503)


async def prometheus(request: Request) -> Response:
    """GET /metrics."""
    server = server_of(request)
    model = server.describe()
    info = {
        "model": model["name"],
        "bundle": model["bundle"],
        "version": model["version"],
        "cdl_edge": model["cdl_edge"],
    }
    info |= {key: model["runner"][key] for key in ("backend", "precision", "threads", "runners")}
    return Response(
        server.metrics.text(server.live.health(), info), headers={"content-type": request_metrics.CONTENT_TYPE}
    )


async def refused(request: Request, error: Exception) -> Response:
    """Bad input: its message, with the status that it names."""
    status = error.status if isinstance(error, Refused) else 400
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(status)
    return _problem(request, status, KINDS.get(status, "input"), str(error), headers)


async def busy(request: Request, error: Exception) -> Response:
    """Back-pressure: 503, and when to come again."""
    assert isinstance(error, Busy)
    return _problem(request, 503, "busy", str(error), {"retry-after": str(error.retry_after_s)})


async def unknown(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    text = (
        f"{error.detail}\n  got:      {request.method} {request.scope['path'][:200]}\n  do:       look at / or /health"
    )
    return _problem(request, error.status_code, KINDS.get(error.status_code, "input"), text, error.headers)


async def gone(request: Request, error: Exception) -> Response:
    """The client left before its request was whole: nobody reads this answer."""
    return _problem(request, 400, "gone", "the request is not whole")


async def failed(request: Request, error: Exception) -> Response:
    """A bug, or an engine that gave up: the trace is in the server's log."""
    return _problem(request, 500, "internal", "internal error\n  do:       look at the log of the server")


def _problem(request: Request, status: int, kind: str, text: str, headers: object = None) -> Response:
    server_of(request).metrics.error(kind)
    extra = dict(headers) if isinstance(headers, dict) else None
    return answered({"error": text, "kind": kind}, status, extra)


class Counting:
    """Counts and times every request."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.metrics = app, server.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.begin()
        try:
            await self.app(scope, receive, observed)
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            self.metrics.end(endpoint, status, time.perf_counter() - begin)


async def _guarded(server: Server, period: float) -> None:
    """Tell systemd that all is well, as long as it is: a stuck engine ends in a restart (WatchdogSec=)."""
    while True:
        if server.live.health()["status"] == "ok":
            notify("WATCHDOG=1")
        await anyio.sleep(period)


async def _probing(server: Server) -> None:
    """Health tells of answers: where no picture was classified for PROBE_S, the server asks itself."""
    while True:
        await anyio.sleep(PROBE_S)
        if time.monotonic() - server.answered_at > PROBE_S:
            await server.probe()
        else:
            server.live.failing = None


async def _watch(server: Server) -> None:
    """Every WATCH_S: is there another version on the disk? One that cannot be put in is named once.

    What two looks find alike is taken: while a bundle is copied over, file by file, each look finds another one.
    """
    seen = before = None  # loading takes a while, and another version may have come meanwhile
    with ThreadPoolExecutor(1, "cdl-edge-watch") as looking:
        while True:
            await anyio.sleep(WATCH_S)
            found, last = server.stamp(), before
            before = found
            if found is None or found == seen or found != last:
                continue
            looked = looking.submit(server.follow)
            await anyio.to_thread.run_sync(wait, [looked])
            error = looked.exception()  # whatever it is: this task goes on, and with it all others
            if isinstance(error, Busy):
                continue
            if error is not None:
                LOG.warning(f"{server.source}: the new version is not used, the old one goes on\n{error}")
            if error is not None and not isinstance(error, InputError):
                BUGS.error("a bug", exc_info=error)
            seen = found
