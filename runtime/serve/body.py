"""What a client sends: never more than was allowed, of a type that was asked for, within a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import anyio
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from .refuse import Refused

MIB = 1 << 20
MULTIPART = "multipart/form-data"
DRAIN = 8
"""times the limit that is read and thrown away before a body that is too large is refused: a client that is still
sending when the connection closes sees a broken connection instead of the message"""


@dataclass(frozen=True)
class Limits:
    """What a request may be."""

    body_bytes: int = 32 * MIB
    "of pictures and tensors; a 40-megapixel JPEG of a camera has about 20 MiB"
    pack_bytes: int = 512 * MIB
    pictures: int = 64
    "in one request, also of tensors"
    body_s: float = 30.0
    "until a body has arrived; a pack has ten times as long"
    answer_s: float = 30.0
    "from then until the answer"


async def read(request: Request, limit: int, seconds: float) -> bytes:
    """The whole body. Raises: Refused (413, 408)."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) <= limit:  # no more than that arrives: nothing to count
        parts: list[bytes] = []
        try:
            with anyio.fail_after(seconds):
                async for chunk in request.stream():
                    parts.append(chunk)
        except TimeoutError:
            raise _late(sum(map(len, parts)), seconds) from None
        return b"".join(parts)
    return b"".join([chunk async for chunk in chunks(request, limit, seconds)])


async def read_pictures(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """(file name as the client gave it, content) of the body, or of each file of a form.

    Raises: Refused: 413 for a body too large, 408 for one too slow, 415 for another type, 400 for a broken form.
    """
    kind = content_type(request)
    if kind == MULTIPART:
        return await _files(request, limits)
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise Refused(
            415,
            "content type of a picture expected",
            got=kind,
            expected=f"image/*, application/octet-stream or {MULTIPART}",
            fix="curl -F image=@photo.jpg URL, or: curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg URL",
        )
    return [("", await read(request, limits.body_bytes, limits.body_s))]


async def save(request: Request, path: Path, limits: Limits) -> None:
    """A pack, as the body or as the only file of a form, to disk. Raises: Refused, as `read_pictures`."""
    seconds = 10 * limits.body_s
    kind = content_type(request)
    if kind == MULTIPART:
        parser = MultiPartParser(request.headers, chunks(request, limits.pack_bytes, seconds), max_files=1)
        files = await _parsed(parser)
        if len(files) != 1:
            raise Refused(400, "one pack expected", got=f"{len(files)} files in the form", fix="curl -F pack=@FILE URL")
        with open(path, "wb") as stream:
            await anyio.to_thread.run_sync(_copy, files[0], stream)
        return
    if kind not in ("", "application/octet-stream", "application/zip"):
        expected = f"application/octet-stream or {MULTIPART}"
        raise Refused(415, "content type of a pack expected", got=kind, expected=expected, fix="curl -F pack=@FILE URL")
    with open(path, "wb") as stream:
        async for chunk in chunks(request, limits.pack_bytes, seconds):
            stream.write(chunk)


async def chunks(request: Request, limit: int, seconds: float) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises: Refused when it is larger than `limit` bytes or takes longer than `seconds`."""
    declared = request.headers.get("content-length", "")
    declared_bytes = int(declared) if declared.isdecimal() else 0
    deadline, got = anyio.current_time() + seconds, 0
    stream = request.stream()
    while declared_bytes <= DRAIN * limit and got <= DRAIN * limit:
        try:
            with anyio.fail_after(max(0.0, deadline - anyio.current_time())):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise _late(got, seconds) from None
        if chunk is None:
            break
        got += len(chunk)
        if max(got, declared_bytes) <= limit:
            yield chunk
    size = max(got, declared_bytes)
    if size > limit:
        expected = f"at most {limit} bytes ({limit / MIB:g} MiB)"
        raise Refused(413, "the body is too large", got=f"{size} bytes", expected=expected, fix="send less at a time")


def _late(got: int, seconds: float) -> Refused:
    return Refused(408, "the body does not arrive", got=f"{got} bytes after {seconds:g} s")


def content_type(request: Request) -> str:
    """The type alone, in lower case; empty when there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


class _InMemory(MultiPartParser):
    """Pictures are read at once: a file on the card of a board would only be a detour."""

    spool_max_size = 1 << 40


async def _files(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    stream = chunks(request, limits.body_bytes, limits.body_s)
    files = await _parsed(_InMemory(request.headers, stream, max_files=limits.pictures, max_fields=limits.pictures))
    return [(file.filename or "", file.file.read()) for file in files]


async def _parsed(parser: MultiPartParser) -> list[UploadFile]:
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary
        reason = getattr(error, "message", f"no {error} in the content type")
        raise Refused(400, "the form cannot be read", got=reason, fix="curl -F image=@photo.jpg URL") from error
    return [value for _, value in form.multi_items() if isinstance(value, UploadFile)]


def _copy(source: UploadFile, target: IO[bytes]) -> None:
    while block := source.file.read(MIB):
        target.write(block)
