"""Packs over HTTP: install, roll back, list; and who may.

Whoever may install a pack decides what the device says. Without a token that is somebody on the device itself: the
connection comes from a loopback address, went through no proxy, and was not made by a page of another site (a browser
on the device would send its requests, too). With a token it is whoever has the token, wherever the request comes from.
"""

from __future__ import annotations

import hmac
import ipaddress
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...errors import InputError
from .. import packs
from .body import save
from .refuse import Refused
from .server import Server, server_of

_PROXIED = ("forwarded", "x-forwarded-for", "x-real-ip")


async def listed(request: Request) -> Response:
    """GET /packs: the versions that are kept."""
    server = server_of(request)
    found = await anyio.to_thread.run_sync(packs.listed, server.source)
    return JSONResponse({"packs": found, "version": server.handle.health()["version"]})


async def install(request: Request) -> Response:
    """POST /packs: a pack as the body or as the file of a form."""
    server = server_of(request)
    check_admin(request, server.token)
    with tempfile.TemporaryDirectory(prefix="cdl-edge-pack-") as folder:
        path = Path(folder) / "upload.pack"  # never the client's name
        await save(request, path, server.limits)
        options = (server.public_key, server.handle.backend, server.handle.threads)
        try:
            return await _answer(server, "installed", lambda: packs.install(path, server.source, *options))
        except InputError as error:  # the client knows nothing of this path
            text = str(error).replace(str(path), "the pack")
            raise Refused(error.status if isinstance(error, Refused) else 400, text) from error


async def rollback(request: Request) -> Response:
    """POST /packs/rollback?to=: the version before, or the kept one that is named."""
    server = server_of(request)
    check_admin(request, server.token)
    options = (request.query_params.get("to"), server.handle.backend, server.handle.threads)
    return await _answer(server, "rolled_back", lambda: packs.rollback(server.source, *options))


async def _answer(server: Server, key: str, change: Callable[[], dict[str, Any]]) -> Response:
    return JSONResponse(await anyio.to_thread.run_sync(_changed, server, key, change))


def _changed(server: Server, key: str, change: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Change the bundle on disk, then what answers; where the second fails, the first is undone."""
    if not server.changing.acquire(blocking=False):
        raise Refused(409, "another pack is being installed", fix="wait for its end, then look at /packs")
    try:
        done = change()
        try:
            swapped = server.exchange()
        except InputError:
            packs.rollback(server.source, done["previous"], server.handle.backend, server.handle.threads)
            raise
        return {key: done, **swapped}
    finally:
        server.changing.release()


def check_admin(request: Request, token: str | None) -> None:
    """Raises: Refused (401, 403) unless this request may change the bundle; see the module."""
    if token is not None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {token}".encode()):
            raise Refused(401, "a token is needed", expected="Authorization: Bearer TOKEN", fix="see `serve --token`")
        return
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    origin = request.headers.get("origin")
    reasons = {
        "the connection comes from another machine": not _loopback(request.client.host if request.client else ""),
        "the request went through a proxy": any(name in request.headers for name in _PROXIED),
        "the host asked for is not this machine": host != "localhost" and not _loopback(host),
        "a page of another site sent it": origin is not None and urlsplit(origin).netloc != request.headers.get("host"),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise Refused(
            403,
            "packs are installed from this machine only",
            got=reason,
            fix="start the server with --token, and send: Authorization: Bearer TOKEN",
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
