"""Classes over HTTP: teach one from pictures, judge pictures before, take a class out again. Who may: see admin.py."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response

from ..errors import InputError
from ..updates import enrol
from .admin import answer, check_admin
from .change import in_a_process
from .refuse import Refused
from .server import Server, answered, server_of


async def enrolments(request: Request) -> Response:
    """GET /enrolments: what was enrolled, why nothing can be, and what may be sent in one request."""
    server = server_of(request)
    found = await anyio.to_thread.run_sync(enrol.enrolments, server.source)
    obstacle = enrol.obstacle(server.live.runner.bundle)
    limits = {"pictures": server.limits.pictures, "body_bytes": server.limits.body_bytes, "max_drop": enrol.MAX_DROP}
    version = server.live.health()["version"]
    return answered({"enrolments": found, "obstacle": obstacle, "version": version, "limits": limits})


async def enrol_class(request: Request) -> Response:
    """POST /enrolments?name=&max_drop=&keep=: a class from the pictures of a form."""
    server = server_of(request)
    check_admin(request, server.token)
    order = {"do": "enrol", **_name(request), "max_drop": _points(request)}
    order["keep_pictures"] = request.query_params.get("keep") == "1"
    return await _with_pictures(request, order)


async def judge(request: Request) -> Response:
    """POST /enrolments/judge?name=: what teaching these pictures would answer; nothing changes."""
    server = server_of(request)
    check_admin(request, server.token)
    return await _with_pictures(request, {"do": "judge", **_name(request)})


async def remove(request: Request) -> Response:
    """POST /enrolments/remove?name=: take the pictures of a class out again."""
    server = server_of(request)
    check_admin(request, server.token)
    order = {"do": "remove", **_name(request), **server.place()}
    return await answer(server, "removed", partial(in_a_process, order, server.install_s))


async def _with_pictures(request: Request, order: dict[str, Any]) -> Response:
    """Do it with the pictures that came, in files that are gone afterwards."""
    server = server_of(request)
    with tempfile.TemporaryDirectory(prefix="cdl-edge-teach-") as folder, server.reader(request) as reader:
        pictures = await reader.pictures()
        paths = await anyio.to_thread.run_sync(_write, Path(folder), [content for _, content in pictures])
        whole = {**order, "images": [str(path) for path in paths], **server.place()}
        given = [name or f"picture {i + 1}" for i, (name, _) in enumerate(pictures)]
        try:
            if order["do"] == "judge":
                return answered(await _judged(server, whole))
            return await answer(server, "taught", partial(in_a_process, whole, server.install_s))
        except InputError as error:  # the client knows nothing of these paths
            text = str(error)
            for path, name in zip(paths, given, strict=True):
                text = text.replace(str(path), name[:100])
            raise Refused(error.status if isinstance(error, Refused) else 400, text) from error


async def _judged(server: Server, order: dict[str, Any]) -> dict[str, Any]:
    """One at a time: each computes with one core and some hundred megabytes."""
    if not server.judging.acquire(blocking=False):
        raise Refused(503, "other pictures are being judged", fix="wait for the end")
    processes: list[Any] = []
    try:
        work = partial(in_a_process, order, server.install_s, processes.append)
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
    finally:
        for process in processes:
            process.kill()
        server.judging.release()


def _write(folder: Path, contents: Sequence[bytes]) -> list[Path]:
    """Into files whose names are ours."""
    paths = [folder / f"{i:03d}.jpg" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def _name(request: Request) -> dict[str, str]:
    name = request.query_params.get("name", "")
    enrol.check_name(name)
    return {"name": name}


def _points(request: Request) -> float:
    text = request.query_params.get("max_drop", "")
    try:
        points = float(text) if text else enrol.MAX_DROP
    except ValueError:
        points = -1.0
    if not 0 <= points <= 100:
        raise Refused(400, "query parameter 'max_drop'", got=repr(text[:50]), expected="0 to 100 points")
    return points
