"""Packs over HTTP: install, roll back, list; and who may.

Whoever may install a pack decides what the device says. That is who has the token, wherever the request comes from, and
who comes through the Unix socket, whose file only this user can open. No address is trusted: a proxy on this machine
has one of this machine, and so has a browser. A pack has to be signed, unless the server was told that it need not be.
"""

from __future__ import annotations

import hmac
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response

from ..artefacts.bundle import open_bundle
from ..errors import InputError
from ..updates import packs
from ..updates.store import read_store
from .body import save
from .change import in_a_process
from .live_model import version_name
from .refuse import Refused
from .server import Server, answered, server_of

Change = Callable[[Callable[["Popen[str]"], None]], dict[str, Any]]
"changes the bundle on disk; tells of the process that does it"


async def listed(request: Request) -> Response:
    """GET /packs: the versions that are kept."""
    server = server_of(request)
    found = await anyio.to_thread.run_sync(packs.listed, server.source)
    return answered({"packs": found, "version": server.live.health()["version"]})


async def install(request: Request) -> Response:
    """POST /packs: a pack as the body or as the file of a form."""
    server = server_of(request)
    check_admin(request, server.token)
    with tempfile.TemporaryDirectory(prefix="cdl-edge-pack-") as folder, server.reader(request) as reader:
        path = Path(folder) / "upload.pack"  # never the client's name
        await save(reader, path)
        order = {"do": "install", "pack": str(path)}
        if server.public_key is not None:
            order["public_key"] = str(server.public_key.absolute())
        try:
            return await answer(server, "installed", partial(_installed, server, order))
        except InputError as error:  # the client knows nothing of this path
            text = str(error).replace(str(path), "the pack")
            raise Refused(error.status if isinstance(error, Refused) else 400, text) from error


async def rollback(request: Request) -> Response:
    """POST /packs/rollback?to=: the version before, or the kept one that is named."""
    server = server_of(request)
    check_admin(request, server.token)
    return await answer(server, "rolled_back", partial(_rolled_back, server, request.query_params.get("to")))


async def answer(server: Server, key: str, change: Change) -> Response:
    """Change the bundle in a process, put the new version in, and answer {key: what was changed, and the exchange}."""
    processes: list[Popen[str]] = []
    try:
        work = partial(_changed, server, key, partial(change, processes.append))
        return answered(await anyio.to_thread.run_sync(work, abandon_on_cancel=True))
    finally:  # also where the server's own end does not wait any longer
        for process in processes:
            process.kill()


def _installed(server: Server, order: dict[str, Any], started: Callable[[Popen[str]], None]) -> dict[str, Any]:
    if server.public_key is None and not server.allow_unsigned and not read_store(server.source)[1].keys.trusted:
        raise Refused(
            403,
            "packs have to be signed, and this server knows no key",
            got="no --public-key, and none pinned by an earlier pack",
            fix="start the server with --public-key FILE, or with --allow-unsigned where packs need no signature",
        )
    return in_a_process({**order, **server.place()}, server.install_s, started)


def _rolled_back(server: Server, to: str | None, started: Callable[[Popen[str]], None]) -> dict[str, Any]:
    return in_a_process({"do": "rollback", "to": to, **server.place()}, server.install_s, started)


def _changed(server: Server, key: str, change: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Change the bundle on disk, then what answers; where the second fails, the first is undone."""
    if not server.changing.acquire(blocking=False):
        raise Refused(409, "another change of the bundle is going on", fix="wait for its end, then look at /packs")
    try:
        before = _on_disk(server)
        try:
            done = change()
        except InputError:
            if _on_disk(server) != before:  # its process was ended behind the moment that counts
                _rolled_back(server, before, lambda _: None)
            raise
        try:
            swapped = server.exchange()
        except InputError:
            _rolled_back(server, done["previous"], lambda _: None)
            raise
        return {key: done, **swapped}
    finally:
        server.changing.release()


def _on_disk(server: Server) -> str:
    return version_name(open_bundle(server.source, verify=False))


def check_admin(request: Request, token: str | None) -> None:
    """Raises: Refused (401, 403) unless this request may change the bundle; see the module.

    "owner" in the state of the request is what guard.py found out about the other end of the Unix socket.
    """
    if request.scope.get("state", {}).get("owner") is True:
        return
    if token is None:
        raise Refused(403, "this server takes no packs here", fix="start it with a token: see `serve --token`")
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode("latin-1", "replace"), f"Bearer {token}".encode()):
        raise Refused(
            401,
            "a token is needed",
            expected="Authorization: Bearer TOKEN",
            fix="the server says where it is kept when it starts; see `serve --token`",
        )
