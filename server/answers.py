"""Pictures or tensors in, answers out: /predict, /batch and the Open Inference Protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from ..errors import InputError
from ..images import UnreadableImage
from ..runtime.predict import predict as classify
from ..runtime.runner import Runner
from . import protocol
from .body import content_type
from .live_model import version_name
from .refuse import Refused
from .server import Server, answered, server_of

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
    with server.reader(request) as reader:
        pictures = await reader.pictures()
        if single and len(pictures) != 1:
            raise Refused(400, "one picture expected", got=f"{len(pictures)} files", fix="send several to /batch")
        most, end = 1 if top is None else top, time.monotonic() + server.limits.answer_s
        result, facts = await server.compute(lambda runner: _predictions(server, runner, pictures, task, most, end))
    server.answered_at = time.monotonic()
    return answered({**result, **facts}, headers={VERSION_HEADER: facts["version"]})


async def classes(request: Request) -> Response:
    """GET /classes: what can be answered, by task."""
    bundle = server_of(request).live.runner.bundle
    tasks = [{"task": i, "classes": [bundle.classes[c] for c in task]} for i, task in enumerate(bundle.tasks)]
    return answered({"version": version_name(bundle), "tasks": tasks})


def _predictions(
    server: Server, runner: Runner, pictures: Sequence[tuple[str, bytes]], task: int | None, top: int, end: float
) -> dict[str, Any]:
    """Answer as `runtime.predict.predict` does, with the files' names. end: when the time is up, time.monotonic()."""
    pixels: list[np.ndarray] = []
    for name, content in pictures:
        left = end - time.monotonic()
        if left <= 0:
            raise Refused(504, "no answer in time", got=f"{len(pixels)} of {len(pictures)} pictures decoded")
        limit = min(left, server.limits.decode_s)
        try:
            pixels.append(server.decoders.read(runner.bundle.preprocessing, content, limit))
        except UnreadableImage as error:
            raise InputError(f"{name[:200]}: {error}" if name else str(error)) from error
    result = classify(runner, pixels, task, top, decoded=True)
    for (name, content), image, prediction in zip(pictures, pixels, result["predictions"], strict=True):
        prediction["image"] = name or prediction["image"]
        if server.collection is not None and task is None:
            server.collection.offer(content, image, prediction, version_name(runner.bundle))
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
    return answered({"name": "cdl-edge", "version": version, "extensions": protocol.EXTENSIONS})


async def live(request: Request) -> Response:
    """GET /v2/health/live: the process answers."""
    return answered({"live": True})


async def ready(request: Request) -> Response:
    """GET /v2/health/ready and /v2/models/NAME/ready: 200 or 503."""
    server = server_of(request)
    if "name" in request.path_params:
        _check_model(request, server.name, server.live.runner)
    good = server.live.health()["status"] == "ok"
    return answered({"ready": good}, 200 if good else 503)


async def model(request: Request) -> Response:
    """GET /v2/models/NAME."""
    server = server_of(request)
    runner = server.live.runner
    _check_model(request, server.name, runner)
    return answered(protocol.metadata(runner, server.name, version_name(runner.bundle)))


async def infer(request: Request) -> Response:
    """POST /v2/models/NAME/infer: tensors as JSON, or behind it as bytes."""
    server = server_of(request)
    kind = content_type(request)
    if kind not in TENSOR_TYPES:
        raise Refused(415, "content type of tensors expected", got=kind, expected="application/json")
    length, pictures = request.headers.get(protocol.LENGTH_HEADER), server.limits.pictures

    def work(runner: Runner) -> tuple[bytes, dict[str, str]]:
        _check_model(request, server.name, runner)
        begin = time.perf_counter()
        asked = protocol.parse(body, length, runner.signature, pictures)
        start = time.perf_counter()
        outputs = runner.compute(asked.inputs)
        end = time.perf_counter()
        labels, version = runner.bundle.classes, version_name(runner.bundle)
        content = protocol.answer(asked, outputs, labels, server.name, version)
        images = len(asked.inputs[runner.signature.images])
        seconds = {"input": start - begin, "infer": end - start, "output": time.perf_counter() - end}
        server.metrics.inferred(images, seconds)
        return content

    begin = time.perf_counter()
    done = False
    try:
        with server.reader(request) as reader:
            body = await reader.read()
            (content, headers), facts = await server.compute(work)
        done = True
    finally:
        server.metrics.asked(done, time.perf_counter() - begin)
    return Response(content, headers={**headers, VERSION_HEADER: facts["version"]})


async def configuration(request: Request) -> Response:
    """GET /v2/models/NAME/config."""
    server = server_of(request)
    _check_model(request, server.name, server.live.runner)
    return answered(protocol.configuration(server.live.runner, server.name, server.limits.pictures))


async def statistics(request: Request) -> Response:
    """GET /v2/models/stats and /v2/models/NAME/stats."""
    server = server_of(request)
    if "name" in request.path_params:
        _check_model(request, server.name, server.live.runner)
    version = version_name(server.live.runner.bundle)
    return answered({"model_stats": [{"name": server.name, "version": version, **server.metrics.statistics()}]})


async def index(request: Request) -> Response:
    """POST /v2/repository/index: the one model."""
    server = server_of(request)
    found = server.live.health()
    good = found["status"] == "ok"
    state, reason = ("READY", "") if good else ("UNAVAILABLE", found["reason"] or found["status"])
    version = version_name(server.live.runner.bundle)
    return answered([{"name": server.name, "version": version, "state": state, "reason": reason}])


def _check_model(request: Request, name: str, runner: Runner) -> None:
    """Raises: Refused (404) unless the path names this model and, where it has one, the version of the runner."""
    asked, version = request.path_params["name"], request.path_params.get("version")
    if asked != name:
        raise Refused(404, "no such model", got=repr(asked[:100]), expected=repr(name))
    if version is not None and version != version_name(runner.bundle):
        raise Refused(404, "no such version", got=repr(version[:100]), expected=repr(version_name(runner.bundle)))
