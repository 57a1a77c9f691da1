"""The collected pictures over HTTP: list, look, sort into classes, discard. They are private: all needs the token."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from starlette.requests import Request
from starlette.responses import Response

from .admin import check_admin
from .collect import Collection
from .refuse import Refused
from .server import answered, server_of

MOST = 500
"pictures in one request"


def _collection(request: Request) -> Collection:
    """Raises: Refused without the token (401, 403), and where no pictures are collected (404)."""
    server = server_of(request)
    check_admin(request, server.token)
    if server.collection is None:
        raise Refused(404, "this server collects no pictures", fix="start it with --collect DIR")
    return server.collection


async def collected(request: Request) -> Response:
    """GET /collected: pictures that nobody has sorted, and how many of each class were."""
    return answered(await anyio.to_thread.run_sync(_collection(request).listed))


async def collected_picture(request: Request) -> Response:
    """GET /collected/picture?id=: one of them, as it came."""
    content = await anyio.to_thread.run_sync(_collection(request).read, request.query_params.get("id", ""))
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff", "content-disposition": "attachment"}
    return Response(content, headers=headers, media_type="application/octet-stream")


async def sort_collected(request: Request) -> Response:
    """POST /collected/sort?id=&id=&name=: into the folder of a class."""
    collection, name = _collection(request), request.query_params.get("name", "")
    return await _moved(request, lambda ids: collection.sort(ids, name))


async def discard_collected(request: Request) -> Response:
    """POST /collected/discard?id=&id=: delete them."""
    return await _moved(request, _collection(request).discard)


async def _moved(request: Request, do: Callable[[list[str]], int]) -> Response:
    ids = request.query_params.getlist("id")
    if not 0 < len(ids) <= MOST:
        raise Refused(400, "query parameter 'id'", got=f"{len(ids)} of them", expected=f"1 to {MOST}")
    return answered({"pictures": await anyio.to_thread.run_sync(do, ids)})
