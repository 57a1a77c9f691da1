"""A real datagram socket stands in for systemd's."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from cdl_edge.server import notify as room
from cdl_edge.server.notify import notify, watchdog_s

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")


@pytest.fixture(params=["path", "abstract"])
def systemd(request, monkeypatch):
    """The end that systemd holds, named by $NOTIFY_SOCKET."""
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets are Linux's")
    folder = tempfile.mkdtemp()  # tmp_path may be longer than the 108 bytes of a socket's name
    name = f"@cdl-edge-{uuid.uuid4()}" if request.param == "abstract" else str(Path(folder) / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("\0" + name[1:] if request.param == "abstract" else name)
        end.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield end
    shutil.rmtree(folder)


def test_a_state_arrives_as_one_datagram(systemd):
    assert notify("READY=1\nSTATUS=ready, 3 Bündel")
    assert systemd.recv(1000) == "READY=1\nSTATUS=ready, 3 Bündel".encode()
    assert notify("WATCHDOG=1") and notify("STOPPING=1")
    assert [systemd.recv(1000), systemd.recv(1000)] == [b"WATCHDOG=1", b"STOPPING=1"]


def test_nobody_listens(systemd, monkeypatch):
    monkeypatch.setattr(room, "TIMEOUT_S", 0.05)
    sent = 0
    while sent < 10_000 and notify("WATCHDOG=1"):
        sent += 1
    assert 0 < sent < 10_000, "a full queue ends the attempt, not the service"
    systemd.close()
    assert notify("WATCHDOG=1") is False


@pytest.mark.parametrize("address", [None, "", "/nowhere/at/all", "vsock:2:1234", "relative", "/" + "x" * 300])
def test_without_systemd_nothing_is_sent(monkeypatch, address):
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify("READY=1") is False


@pytest.mark.parametrize(
    ("period", "process", "seconds"),
    [
        ("30000000", None, 15.0),
        ("30000000", "own", 15.0),
        ("500000", "", 0.25),
        ("30000000", "1", None),
        (None, None, None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
    ],
)
def test_half_of_what_systemd_waits(monkeypatch, period, process, seconds):
    given = {"WATCHDOG_USEC": period, "WATCHDOG_PID": str(os.getpid()) if process == "own" else process}
    for name, value in given.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert watchdog_s() == seconds
