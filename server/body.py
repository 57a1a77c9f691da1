"""What a client sends: never more than was allowed, of a type that was asked for, within a time."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import anyio
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from .refuse import Refused

MIB = 1 << 20
MULTIPART = "multipart/form-data"
ENCODINGS = ("gzip", "x-gzip", "deflate")
DRAIN = 8
"""times the limit that is read and thrown away before a body that is too large is refused: a client that is still
sending when the connection closes sees a broken connection instead of the message"""


@dataclass(frozen=True)
class Limits:
    """Bounds of a request: sizes, counts and times."""

    body_bytes: int = 32 * MIB
    "of pictures and tensors; a 40-megapixel JPEG of a camera has about 20 MiB"
    held_bytes: int = 96 * MIB
    "of all bodies that are in memory at a time"
    form_head_bytes: int = 64 << 10
    "of the header lines of all parts of a form"
    pack_bytes: int = 512 * MIB
    pictures: int = 64
    "in one request, also of tensors"
    body_s: float = 30.0
    "until a body has arrived; a pack has ten times as long"
    answer_s: float = 30.0
    "from then until the answer"
    decode_s: float = 10.0
    "of that, for decoding one picture"


class Upload:
    """What one request holds in memory."""

    def __init__(self) -> None:
        self.size = 0
        self.whole = False
        self.scope: anyio.CancelScope | None = None
        "what waits for more of it"
        self.dropped = False


@dataclass
class Uploads:
    """All bodies that are in memory: together never more than `most` bytes.

    Where more would come, the largest of those that are not whole yet is given up: a few large bodies, sent slowly,
    take no room from the small ones.
    """

    most: int
    _held: set[Upload] = field(default_factory=set)

    @contextlib.contextmanager
    def one(self) -> Iterator[Upload]:
        """Count one upload for as long as its request, and what came with it, is in memory."""
        upload = Upload()
        self._held.add(upload)
        try:
            yield upload
        finally:
            self._held.discard(upload)

    def add(self, upload: Upload, count: int) -> None:
        """More of it has come. Raises: Refused (503) when it is the one that is given up."""
        upload.size += count
        while sum(held.size for held in self._held if not held.dropped) > self.most:
            open_ = [held for held in self._held if not held.whole and not held.dropped]
            largest = max(open_, key=lambda held: held.size, default=upload)
            if largest is upload or largest.scope is None:
                raise self.no_room(upload)
            largest.dropped = True
            largest.scope.cancel()

    def no_room(self, upload: Upload) -> Refused:
        """The error for a body that was given up."""
        got = f"{upload.size} bytes, {self.most} held for all requests"
        return Refused(503, "too much is being sent at once", got=got, fix="wait, then send it again")


@dataclass
class BodyReader:
    """Reads the body of one request into memory, or hands it on in pieces."""

    request: Request
    limits: Limits
    uploads: Uploads
    upload: Upload

    async def read(self) -> bytes:
        """The whole body, unpacked where it came packed. Raises: Refused (413, 408, 415, 503), see `chunks`."""
        encoding = self.request.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity", *ENCODINGS):
            raise _no_encoding(encoding, "gzip, deflate or none")
        body = b"".join([chunk async for chunk in self.chunks(self.limits.body_bytes, self.limits.body_s)])
        if encoding in ENCODINGS:
            body = await anyio.to_thread.run_sync(inflate, body, self.limits.body_bytes)
            self.uploads.add(self.upload, len(body))
        self.upload.whole = True
        return body

    async def pictures(self) -> list[tuple[str, bytes]]:
        """(file name as the client gave it, content) of the body, or of each file of a form.

        Raises: Refused: as `read`; 415 for another type, 400 for a broken form.
        """
        kind = content_type(self.request)
        if kind == MULTIPART:
            most = self.limits.pictures
            stream = self.chunks(self.limits.body_bytes, self.limits.body_s)
            files = await _Form.files(self.request, self.limits, stream, most, in_memory=True)
            self.upload.whole = True
            return [(file.filename or "", file.file.read()) for file in files]
        if kind and not kind.startswith("image/") and kind != "application/octet-stream":
            raise Refused(
                415,
                "content type of a picture expected",
                got=kind,
                expected=f"image/*, application/octet-stream or {MULTIPART}",
                fix="curl -F image=@photo.jpg URL, or: curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg URL",
            )
        return [("", await self.read())]

    async def chunks(self, limit: int, seconds: float, held: bool = True) -> AsyncGenerator[bytes, None]:
        """The body as it comes.

        held: it stays in memory.

        Raises: Refused when it is larger than `limit` bytes (413), takes longer than `seconds` (408), or there is no
            room for it (503).
        """
        declared = self.request.headers.get("content-length", "")
        declared_bytes = int(declared) if declared.isdecimal() else 0
        deadline, got = anyio.current_time() + seconds, 0
        stream, upload = self.request.stream(), self.upload
        while declared_bytes <= DRAIN * limit and got <= DRAIN * limit:
            chunk = None
            with anyio.CancelScope(deadline=deadline) as upload.scope:
                chunk = await anext(stream, None)
            if upload.dropped:
                raise self.uploads.no_room(upload)
            if upload.scope.cancelled_caught:
                raise Refused(408, "the body does not arrive", got=f"{got} bytes after {seconds:g} s")
            if chunk is None:
                break
            got += len(chunk)
            if max(got, declared_bytes) <= limit:
                if held:
                    self.uploads.add(upload, len(chunk))
                yield chunk
        upload.scope = None
        size = max(got, declared_bytes)
        if size > limit:
            expected = f"at most {limit} bytes ({limit / MIB:g} MiB)"
            raise Refused(
                413, "the body is too large", got=f"{size} bytes", expected=expected, fix="send less at a time"
            )


async def save(reader: BodyReader, path: Path) -> None:
    """A pack, as the body or as the only file of a form, to disk. Raises: Refused, as `BodyReader.pictures`."""
    request, limits = reader.request, reader.limits
    stream = reader.chunks(limits.pack_bytes, 10 * limits.body_s, held=False)
    kind, encoding = content_type(request), request.headers.get("content-encoding", "")
    if encoding:
        raise _no_encoding(encoding, "none")
    if kind == MULTIPART:
        files = await _Form.files(request, limits, stream, 1)
        if len(files) != 1:
            raise Refused(400, "one pack expected", got=f"{len(files)} files in the form", fix="curl -F pack=@FILE URL")
        with open(path, "wb") as out:
            await anyio.to_thread.run_sync(_copy, files[0], out)
        return
    if kind not in ("", "application/octet-stream", "application/zip"):
        expected = f"application/octet-stream or {MULTIPART}"
        raise Refused(415, "content type of a pack expected", got=kind, expected=expected, fix="curl -F pack=@FILE URL")
    with open(path, "wb") as out:
        async for chunk in stream:
            out.write(chunk)


def inflate(body: bytes, limit: int) -> bytes:
    """Unpack gzip, or what HTTP calls deflate. Raises: Refused: 400 for something else, 413 above `limit` bytes."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # finds out by itself which of the two
    try:
        content = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refused(400, "the body is not packed as it says", got=str(error), expected="gzip or deflate") from error
    if len(content) > limit:
        expected = f"at most {limit} bytes ({limit / MIB:g} MiB)"
        raise Refused(413, "the body is too large", got="more, once unpacked", expected=expected)
    if not unpacker.eof or unpacker.unused_data:
        raise Refused(400, "the packed body is not whole", got=f"{len(body)} bytes", fix="send it again")
    return content


def _no_encoding(encoding: str, expected: str) -> Refused:
    return Refused(415, "content encoding", got=repr(encoding[:50]), expected=expected, fix="send the body as it is")


def content_type(request: Request) -> str:
    """Content type of a request, without parameters, in lower case; empty when there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


class _Form(MultiPartParser):
    """starlette's, which bounds the values of a form but neither its header lines nor the codec of its names."""

    head_left = 0
    "bytes of header lines that may still come"

    @classmethod
    async def files(
        cls, request: Request, limits: Limits, stream: AsyncGenerator[bytes, None], most: int, in_memory: bool = False
    ) -> list[UploadFile]:
        """Read at most so many files of a form. Raises: Refused (400) for a form that cannot be read."""
        if encoding := request.headers.get("content-encoding", ""):
            raise _no_encoding(encoding, "none, for a form")
        # What it says of its charset is left out: Python has codecs that do odd things. UTF-8 it is.
        fields = request.headers["content-type"].split(";")
        kept = ";".join([f for f in fields if not f.strip().lower().startswith("charset")])
        parser = cls(Headers({"content-type": kept}), stream, max_files=most, max_fields=most)
        parser.head_left = limits.form_head_bytes
        if in_memory:  # a file on the card of a board would only be a detour
            parser.spool_max_size = 1 << 40
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError) as error:  # KeyError: no boundary
            reason = getattr(error, "message", f"no {error} in the content type")
            raise Refused(400, "the form cannot be read", got=reason, fix="curl -F image=@photo.jpg URL") from error
        return [value for _, value in form.multi_items() if isinstance(value, UploadFile)]

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        super().on_header_field(data, start, end)

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        super().on_header_value(data, start, end)

    def _count(self, count: int) -> None:
        self.head_left -= count
        if self.head_left < 0:
            raise MultiPartException("header lines of its parts that are too long")


def _copy(source: UploadFile, target: IO[bytes]) -> None:
    while block := source.file.read(MIB):
        target.write(block)
