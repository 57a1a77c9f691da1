"""Pictures or tensors in, answers out: /predict, /batch and the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...errors import InputError
from ...images import UnreadableImage
from ..handle import version_name
from ..predict import predict as classify
from ..runner import Runner
from . import protocol
from .body import content_type, read, read_pictures
from .refuse import Refused
from .server import server_of

VERSION_HEADER = "x-bundle-version"
# The last one is what `curl -d` says of itself, in every example of the protocol.
TENSOR_TYPES = ("", "application/json", "application/octet-stream", "application/x-www-form-urlencoded")


async def predict(request: Request) -> Response:
    """POST /predict?top=1&task=: one picture."""
    return await _classified(request, single=True)


async def batch(request: Request) -> Response:
    """POST /batch?top=1&task=: the pictures of a form."""
    return await _classified(request, single=False)


async def _classified(request: Request, single: bool) -> Response:
    server = server_of(request)
    top, task = _number(request, "top"), _number(request, "task")
    pictures = await read_pictures(request, server.limits)
    if single and len(pictures) != 1:
        raise Refused(400, "one picture expected", got=f"{len(pictures)} files", fix="send several to /batch")
    most = 1 if top is None else top
    result, facts = await server.compute(lambda runner: _predictions(runner, pictures, task, most))
    return JSONResponse({**result, **facts}, headers={VERSION_HEADER: facts["version"]})


def _predictions(runner: Runner, pictures: Sequence[tuple[str, bytes]], task: int | None, top: int) -> dict[str, Any]:
    """As `runtime.predict.predict`, with the names of the files."""
    try:
        result = classify(runner, [content for _, content in pictures], task, top)
    except UnreadableImage as error:
        for name, content in pictures:  # which one?
            try:
                runner.bundle.preprocessing.read(content)
            except UnreadableImage as found:
                raise InputError(f"{name[:200]}: {found}" if name else str(found)) from error
        raise
    for (name, _), prediction in zip(pictures, result["predictions"], strict=True):
        prediction["image"] = name or prediction["image"]
    return result


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise Refused(400, f"query parameter {name!r}", got=repr(text[:50]), expected="a whole number")
    return int(text)


# -- Open Inference Protocol v2 ----------------------------------------------------------------------------------------


async def about(request: Request) -> Response:
    """GET /v2."""
    version = server_of(request).describe()["cdl_edge"]
    return JSONResponse({"name": "cdl-edge", "version": version, "extensions": protocol.EXTENSIONS})


async def live(request: Request) -> Response:
    """GET /v2/health/live: the process answers."""
    return JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    """GET /v2/health/ready and /v2/models/NAME/ready: 200 or 503."""
    server = server_of(request)
    if "name" in request.path_params:
        _check_model(request, server.name, server.handle.runner)
    good = server.handle.health()["status"] == "ok"
    return JSONResponse({"ready": good}, 200 if good else 503)


async def model(request: Request) -> Response:
    """GET /v2/models/NAME."""
    server = server_of(request)
    runner = server.handle.runner
    _check_model(request, server.name, runner)
    return JSONResponse(protocol.metadata(runner, server.name, version_name(runner.bundle)))


async def infer(request: Request) -> Response:
    """POST /v2/models/NAME/infer: tensors as JSON, or behind it as bytes."""
    server = server_of(request)
    kind = content_type(request)
    if kind not in TENSOR_TYPES:
        raise Refused(415, "content type of tensors expected", got=kind, expected="application/json")
    body = await read(request, server.limits.body_bytes, server.limits.body_s)
    length, pictures = request.headers.get(protocol.LENGTH_HEADER), server.limits.pictures

    def work(runner: Runner) -> tuple[bytes, dict[str, str]]:
        _check_model(request, server.name, runner)
        asked = protocol.parse(body, length, runner.signature, pictures)
        outputs = runner.compute(asked.inputs)
        return protocol.answer(asked, outputs, server.name, version_name(runner.bundle))

    (content, headers), facts = await server.compute(work)
    return Response(content, headers={**headers, VERSION_HEADER: facts["version"]})


def _check_model(request: Request, name: str, runner: Runner) -> None:
    """Raises: Refused (404) unless the path names this model and, where it has one, the version of the runner."""
    asked, version = request.path_params["name"], request.path_params.get("version")
    if asked != name:
        raise Refused(404, "no such model", got=repr(asked[:100]), expected=repr(name))
    if version is not None and version != version_name(runner.bundle):
        raise Refused(404, "no such version", got=repr(version[:100]), expected=repr(version_name(runner.bundle)))
