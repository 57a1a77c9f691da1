"""Connections that say nothing, half of something, or far too much: others are answered all the while."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from http.client import HTTPConnection

import pytest

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'cdl-edge[serve]'")

from cdl_edge.server.body import Limits
from cdl_edge.server.guard import Bounds

HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture
def connect():
    """connect(port, address="127.0.0.1") -> a connection from this address of the loopback network."""
    with contextlib.ExitStack() as stack:

        def make(port, address="127.0.0.1"):
            return stack.enter_context(socket.create_connection(("127.0.0.1", port), 20, (address, 0)))

        yield make


def answer(connection, sent=b""):
    """Send, then read to the end of the connection, or of one answer: (status, document), None without an answer."""
    with contextlib.suppress(OSError):  # closed before it took all
        connection.sendall(sent)
    got = b""
    while True:
        try:
            more = connection.recv(1 << 16)
        except ConnectionResetError:
            more = b""
        got += more
        head, found, body = got.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            return int(head[9:12]), json.loads(body)
        if not more:
            return None


def classify(port, tiny, address="127.0.0.1"):
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=20, source_address=(address, 0))) as client:
        client.request("POST", "/predict", tiny.png((255, 0, 0)), {"content-type": "image/png"})
        return client.getresponse().status


@pytest.mark.parametrize("sent", [b"", b"POST /pre", HEAD + b"Content-Length: 1000\r\n\r\nhalf"])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_connections_that_wait_take_no_room(make_server, listen, connect, tiny, sent, address):
    port = listen(make_server(), Bounds(connections=40, per_address=20))
    for _ in range(70):
        connect(port, address).sendall(sent)
    assert [classify(port, tiny) for _ in range(5)] == [200] * 5


def test_many_addresses_share_the_room(make_server, listen, connect, tiny):
    port = listen(make_server(), Bounds(connections=12, per_address=10))
    held = [connect(port, f"127.0.0.{2 + i % 3}") for i in range(30)]
    assert classify(port, tiny, "127.0.0.9") == 200
    assert len(held) == 30


@pytest.mark.slow
def test_the_head_has_a_time(make_server, listen, connect):
    port = listen(make_server(), Bounds(head_s=0.2))
    status, document = answer(connect(port), b"GET /health HTTP/1.1\r\nHo")
    assert status == 408 and document["kind"] == "slow_head"
    assert answer(connect(port)) is None  # silent: closed


def test_a_body_that_is_not_read_has_a_time(make_server, listen, connect):
    """Refused for its type at once; that it goes on sending keeps nothing open."""
    port = listen(make_server(), Bounds(head_s=0.2))
    connection = connect(port)
    status, _ = answer(connection, HEAD + b"Content-Type: text/x\r\nContent-Length: 1000\r\n\r\nhalf")
    assert status == 415
    assert answer(connection) is None


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
        b"GET /health HTTP/1.1\r\na: " + b"b" * 40_000,
        b"GET /health HTTP/1.1\r\na: " + b"b" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"b" * 40_000,
        b"G" * 40_000,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"a: b\r\n" * 100_000,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\na: " + b"b" * 400_000,
    ],
    ids=["lines", "many lines", "open line", "long line", "path", "method", "trailers", "open trailer"],
)
def test_the_head_has_a_size(make_server, listen, connect, tiny, sent):
    server = make_server()
    port = listen(server)
    got = answer(connect(port), sent)
    assert got is None or got[0] in (400, 431)
    text = server.metrics.text(server.live.health(), {})
    assert 'kind="head"' in text or 'kind="http"' in text
    assert classify(port, tiny) == 200


def test_a_client_that_does_not_read(make_server, listen, connect, tiny):
    server = make_server()
    port = listen(server, Bounds(send_s=0.2, pipelined=10**6))
    connection = connect(port)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)  # of some 30 kB each: no kernel keeps so much
    end = time.monotonic() + 20
    while 'kind="slow_reader"' not in server.metrics.text(server.live.health(), {}):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert classify(port, tiny) == 200


def test_many_requests_at_once_on_one_connection(make_server, listen, connect, tiny):
    """Each waits as an object 100 times as large as it came."""
    server = make_server()
    port = listen(server)
    connect(port).sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
    end = time.monotonic() + 20
    while 'kind="pipelined"' not in server.metrics.text(server.live.health(), {}):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert classify(port, tiny) == 200


def test_what_is_no_http(make_server, listen, connect):
    status, document = answer(connect(listen(make_server())), b"\x16\x03\x01 hello\r\n\r\n")
    assert status == 400 and document["kind"] == "http"


def test_large_bodies_take_no_room_from_small_ones(make_server, listen, connect, tiny):
    """Four of them are on their way when there is room for two: the largest goes, the picture does not."""
    server = make_server(limits=Limits(held_bytes=100_000))
    port = listen(server)
    large = [connect(port) for _ in range(4)]
    for connection in large:
        connection.sendall(HEAD + b"Content-Type: image/png\r\nContent-Length: 60000\r\n\r\n" + bytes(40_000))
    refused = select.select(large, [], [], 20)[0]
    status, document = answer(refused[0])
    assert status == 503 and document["kind"] == "busy" and len(refused) < 4
    assert classify(port, tiny) == 200
