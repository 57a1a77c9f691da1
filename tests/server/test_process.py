"""`serve` as a process of its own: starts, answers, finishes what is in flight, ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import pytest

from cdl_edge import server as room
from cdl_edge.errors import InputError

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'cdl-edge[serve]'")
anyio = pytest.importorskip("anyio")
app_room = pytest.importorskip("cdl_edge.server.app")

CODE = """
import os, sys, time
from cdl_edge.runtime.backends.onnxruntime import OrtEngine
from cdl_edge.server import serve
real = OrtEngine.call
def slow(runner, feeds):
    time.sleep(float(sys.argv[2]))
    return real(runner, feeds)
OrtEngine.call = slow
token = None if "STATE_DIRECTORY" in os.environ else "x" * 20
serve(sys.argv[1], port=0, threads=1, token=token, say=lambda line: print(line, flush=True))
print("ended", flush=True)
"""


@pytest.fixture
def start():
    """start(bundle, seconds a call) -> (process, port)."""
    made = []

    def make(bundle, seconds=0.0):
        arguments = [sys.executable, "-c", CODE, str(bundle), str(seconds)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        made.append(process)
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, line + process.stdout.read()
        port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return process, port
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.05)

    yield make
    for process in made:
        process.kill()
        process.communicate()


def ask(port, picture):
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/predict", picture, {"content-type": "image/png"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_is_in_flight(start, make_version, tiny, number):
    process, port = start(make_version(0), 0.3)
    answers = []
    clients = [threading.Thread(target=lambda: answers.append(ask(port, tiny.png((255, 0, 0))))) for _ in range(3)]
    for client in clients:
        client.start()
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    while True:  # until all three are in
        connection.request("GET", "/health")
        if json.loads(connection.getresponse().read())["in_flight"] == 3:
            break
    process.send_signal(number)
    for client in clients:
        client.join()
    assert [status for status, _ in answers] == [200] * 3
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "ended\n")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)


@pytest.mark.slow
def test_systemd_hears_of_it(start, make_version, tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
        process, _ = start(make_version(0))
        kept = tmp_path / "state" / "token"
        assert kept.read_text().strip() in process.stdout.readline() and kept.stat().st_mode & 0o777 == 0o600
        heard = {systemd.recv(100) for _ in range(4)}
        assert heard == {b"READY=1", b"WATCHDOG=1"}
        process.send_signal(signal.SIGTERM)
        while systemd.recv(100) != b"STOPPING=1":
            pass
        process.communicate(timeout=30)


def test_a_stuck_engine_is_not_alive(make_server, monkeypatch):
    server, sent = make_server(), []
    monkeypatch.setattr(app_room, "notify", sent.append)

    async def watched(status):
        monkeypatch.setattr(server.live, "health", lambda: {"status": status})
        with anyio.move_on_after(0.05):
            await app_room._guarded(server, 0.01)

    anyio.run(watched, "stuck")
    assert sent == []
    anyio.run(watched, "ok")
    assert set(sent) == {"WATCHDOG=1"}


def test_an_address_that_cannot_be_had(make_version):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen"):
        room.serve(make_version(0), port=taken.getsockname()[1], threads=1)
    with pytest.raises(InputError, match="cannot listen"):
        room.serve(make_version(0), host="256.1.1.1", threads=1)
    with pytest.raises(InputError, match="cannot listen"):
        room.serve(make_version(0), port=70000, threads=1)


def test_connections_do_not_wait_for_acknowledgements():
    with room.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_bundle_that_is_none(tmp_path):
    with pytest.raises(InputError, match="no such bundle"):
        room.serve(tmp_path / "nothing", port=0)


def test_a_key_that_is_none_is_told_at_the_start(tmp_path):
    """Not by the first pack, which may come months later."""
    (tmp_path / "notes.pem").write_text("no key")
    for name, reason in (("notes.pem", "not a public key"), ("missing.pem", "cannot be read")):
        with pytest.raises(InputError, match=f"{name}: {reason}"):
            room.serve(tmp_path / "nothing", port=0, public_key=tmp_path / name)


@pytest.mark.parametrize("package", ["uvicorn", "starlette", "python_multipart", "httptools"])
def test_a_missing_package_is_named(make_version, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}[\s\S]*pip install 'cdl-edge\[serve\]'"):
        room.serve(make_version(0), port=0)


def test_importing_the_room_loads_no_server():
    code = "import cdl_edge.server, sys; print([m for m in ('starlette', 'uvicorn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
