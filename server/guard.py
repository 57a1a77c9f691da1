"""What stands between the network and uvicorn: how many connections, how long a head, how slow a client.

uvicorn waits without end for a request that never becomes whole, keeps every header line of it, and counts such
connections against everybody. Hypercorn and granian have time limits, but no limits per address either (2026-11).
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import struct
from dataclasses import dataclass, field

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .request_metrics import RequestMetrics

LOCAL = "unix"
"the address of whoever comes through the Unix socket"
SWEEP_S = 0.5
"how often connections are looked at"
_STATUS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


@dataclass(frozen=True)
class Bounds:
    """Bounds of connections: numbers and times."""

    connections: int = 512
    per_address: int = 128
    "of one address of IPv4, or one /64 network of IPv6; a proxy has one address, too"
    head_bytes: int = 32 << 10
    "of the request line and the header lines; also of trailers"
    head_lines: int = 100
    pipelined: int = 16
    "requests of one connection that wait for the answer to the one before"
    head_s: float = 10.0
    "until the head of a request has arrived"
    send_s: float = 30.0
    "for which a client may leave unread what was sent to it"


@dataclass
class Guard:
    """All connections of a server, and the rules for them. Only the event loop's thread may touch it."""

    metrics: RequestMetrics
    bounds: Bounds = field(default_factory=Bounds)
    connections: set[Connection] = field(default_factory=set)
    _timer: asyncio.TimerHandle | None = None

    def protocol(self) -> type[HttpToolsProtocol]:
        """The class that uvicorn makes one of for each connection: `uvicorn.Config(http=guard.protocol())`."""
        return type("Guarded", (Connection,), {"guard": self})

    def admit(self, new: Connection) -> bool:
        """Take a connection in, at the cost of one that only waits where the limit is reached; False: no room.

        Whoever has most connections loses one first: silent ones take no room from another address, and none for
        long from their own.
        """
        now = new.loop.time()
        by_address: dict[str, list[Connection]] = {new.address: []}
        for connection in self.connections:
            by_address.setdefault(connection.address, []).append(connection)
        if len(by_address[new.address]) >= self.bounds.per_address:
            candidates = by_address[new.address]
        elif len(self.connections) >= self.bounds.connections:
            candidates = max(by_address.values(), key=len)
        else:
            candidates = []
        if candidates:
            victim = min((c for c in candidates if c.waits), key=lambda c: c.worth(now), default=None)
            if victim is None:
                self.metrics.error("connections")
                return False
            self.metrics.error("evicted")
            victim.end()
        self.connections.add(new)
        if self._timer is None:
            self._timer = new.loop.call_later(SWEEP_S, self._sweep, new.loop)
        return True

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self.connections):
            connection.check(now)
        self._timer = loop.call_later(SWEEP_S, self._sweep, loop) if self.connections else None


class Connection(HttpToolsProtocol):
    """uvicorn's, with an eye on the clock and on the bytes of each head."""

    guard: Guard
    address = ""
    served = 0
    "requests answered"
    refused = False
    _phase = "head"
    "head: nothing or a part of one has come; body; answer: all has come, and is being answered; idle: between requests"
    _since = 0.0
    "when the phase began, by the loop's clock"
    _blocked: float | None = None
    "since when the client has not read what was sent"
    _head = 0
    "bytes of header lines, trailers included, that are kept of this request"
    _lines = 0
    "how many they are"
    _loose = 0
    "bytes since the parser made progress that it told of"

    # -- the transport's side ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._since = self.loop.time()
        self.transport, self.address = transport, address_of(transport)
        if self.guard.admit(self):
            super().connection_made(transport)
        else:
            self._refuse(503, "connections", "too many connections\n  do:       wait", {"retry-after": "1"})

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.connections.discard(self)
        if self.flow is not None:  # else it was never let in
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.refused or self.transport.is_closing():
            return
        if self._phase == "idle":
            self._enter("head")
        self._loose += len(data)
        super().data_received(data)
        if self._loose > self.guard.bounds.head_bytes and not self.refused:
            self._too_long()

    def pause_writing(self) -> None:
        self._blocked = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._blocked = None
        super().resume_writing()

    # -- the parser's side ---------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = self._lines = 0
        if self.address == LOCAL:
            self.scope["state"]["owner"] = is_owner(self.transport)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines += 1
        self._count(len(name) + len(value))
        if self._phase == "head":  # the application sees no trailers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._loose = 0
        if self.refused:
            return
        if len(self.pipeline) >= self.guard.bounds.pipelined:
            self.refused = True  # the parser may go on for as long as it has bytes
            self._give_up("pipelined")
            return
        self._enter("body")
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._loose = 0

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        if not self.refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._loose = 0
        if self.refused:
            return
        super().on_message_complete()
        self._enter("idle" if self.cycle.response_complete else "answer")

    def on_response_complete(self) -> None:
        self.served += 1
        # "body": refused before all of it came; what follows is thrown away, for a while. The pipeline: more to answer.
        self._enter("idle" if self._phase == "answer" and not self.pipeline else self._phase)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        if not self.refused:
            self._refuse(400, "http", f"not a request of HTTP\n  got:      {msg}")

    # -- limits --------------------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether the connection only waits for its client."""
        return self._phase != "answer"

    def worth(self, now: float) -> tuple[bool, bool, float]:
        """Order in which connections are given up: silent before sending, strangers before known, old before new."""
        return self._phase == "body", self.served > 0, -(now - self._since)

    def check(self, now: float) -> None:
        """End the connection where its client takes too long."""
        bounds, age = self.guard.bounds, now - self._since
        if self._blocked is not None and now - self._blocked > bounds.send_s:
            self._give_up("slow_reader")
        elif self.transport.is_closing():
            if age > bounds.send_s:  # what was written last is not read either
                self.end()
        elif self._phase in ("head", "idle") and age > bounds.head_s:
            if self._loose and self.flow is not None and self._phase == "head":
                text = f"the head of the request does not arrive\n  got:      {self._loose} bytes after {age:.0f} s"
                self._refuse(408, "slow_head", text)
            else:
                self._give_up("silent" if self._phase == "head" else None)
        elif self._phase == "body" and self.cycle.response_complete and age > bounds.head_s:
            self._give_up("slow_body")

    def end(self) -> None:
        """Close the connection at once, whatever it is doing."""
        self.guard.connections.discard(self)
        self.transport.abort()

    def _give_up(self, kind: str | None) -> None:
        if kind:
            self.guard.metrics.error(kind)
        self.end()

    def _enter(self, phase: str) -> None:
        self._phase, self._since = phase, self.loop.time()

    def _count(self, count: int) -> None:
        self._head += count
        bounds = self.guard.bounds
        if (self._head > bounds.head_bytes or self._lines > bounds.head_lines) and not self.refused:
            self._too_long()

    def _too_long(self) -> None:
        bounds = self.guard.bounds
        expected = f"at most {bounds.head_bytes} bytes in {bounds.head_lines} lines"
        text = (
            f"the head of the request is too long\n  expected: {expected}\n  do:       send what is large as the body"
        )
        self._refuse(431, "head", text)

    def _refuse(self, status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        """Answer and close, past the application: it may not have heard of this request."""
        self.refused, self._since = True, self.loop.time()
        if kind != "connections":
            self.guard.metrics.error(kind)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps({"error": text, "kind": kind}).encode()
            lines = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            head = f"HTTP/1.1 {status} {_STATUS.get(status, 'Bad Request')}\r\n"
            head += "".join(f"{k}: {v}\r\n" for k, v in {**lines, **(headers or {})}.items())
            self.transport.write(head.encode() + b"\r\n" + body)
        self.transport.close()


def address_of(transport: asyncio.BaseTransport) -> str:
    """Whose connections are counted together: an address of IPv4, the /64 network of one of IPv6, or LOCAL."""
    connected: socket.socket = transport.get_extra_info("socket")
    if connected.family == socket.AF_UNIX:
        return LOCAL
    peer = transport.get_extra_info("peername")
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except (ValueError, TypeError, IndexError):  # gone already
        return ""
    if address.version == 6:
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def is_owner(transport: asyncio.BaseTransport) -> bool:
    """Whether the other end of a Unix socket is this user, or root: the kernel says so, where it can.

    Elsewhere than on Linux the mode of the socket's file alone decides, and whoever got in is the owner.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    connected: socket.socket = transport.get_extra_info("socket")
    layout = "3i"
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(layout))
    _, user, _ = struct.unpack(layout, credentials)
    return user in (0, os.geteuid())
