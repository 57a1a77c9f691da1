"""deploy/nginx.conf in a real nginx, in front of a real server: TLS, limits, and packs that still need the token."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]


@pytest.fixture
def server(make_server):
    return make_server()


@pytest.fixture
def secure(server, listen, tmp_path):
    """Port of TLS of an nginx with the configuration that we advise, before a server; the certificate is our own."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem"), "-days", "1"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *made], check=True, capture_output=True
    )
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    changes = {
        "127.0.0.1:8000": f"127.0.0.1:{listen(server)}",
        "listen 443 ssl": f"listen 127.0.0.1:{ports[0]} ssl",
        "listen 80": f"listen 127.0.0.1:{ports[1]}",
        "/etc/ssl/cdl-edge": str(tmp_path),
    }
    for old, new in changes.items():
        assert text.count(old) >= 1
        text = text.replace(old, new)
    places = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off;\nmaster_process off;\npid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\n"
    path = tmp_path / "nginx.conf"
    path.write_text(main + f"http {{\naccess_log off;\n{places}{text}\n}}\n")
    subprocess.run([NGINX, "-t", "-q", "-c", str(path), "-p", str(tmp_path)], check=True)
    process = subprocess.Popen([NGINX, "-c", str(path), "-p", str(tmp_path)])
    try:
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", ports[0]), 1).close()
                break
            assert time.monotonic() < end
            time.sleep(0.05)
        yield ports[0]
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def ask(secure, tmp_path):
    """ask(method, path, body, headers) -> (status, body) over TLS, with the certificate checked."""
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))

    def send(method, path, body=None, headers=None):
        with contextlib.closing(
            http.client.HTTPSConnection("localhost", secure, timeout=30, context=context)
        ) as client:
            client.request(method, path, body, headers or {})
            answer = client.getresponse()
            return answer.status, answer.read()

    return send


def test_pictures_go_through_and_packs_need_the_token(ask, tiny, pack_between, admin, server):
    assert ask("POST", "/predict", tiny.png((255, 0, 0)), {"Content-Type": "image/png"})[0] == 200
    assert ask("GET", "/")[0] == 200 and ask("GET", "/metrics")[0] == 200
    content = pack_between(0, 1).read_bytes()
    for forged in ({}, {"X-Forwarded-For": "127.0.0.1", "Host": "localhost", "Origin": "https://localhost"}):
        status, _ = ask("POST", "/packs", content, forged)
        assert status == 401
    assert server.live.health()["version"] == server.describe()["version"]
    assert len(server.live.runner.bundle.classes) == 4
    status, text = ask("POST", "/packs", content, admin)
    assert status == 200, text
    assert len(server.live.runner.bundle.classes) == 5


def test_what_is_too_large_or_too_slow_stays_outside(ask, secure, tmp_path, tiny, server):
    with contextlib.suppress(OSError):  # it may close before all is sent
        status, _ = ask("POST", "/predict", bytes(33 << 20), {"Content-Type": "image/png"})
        assert status == 413
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    with contextlib.ExitStack() as stack:
        for _ in range(25):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", secure), 20))
            half = stack.enter_context(context.wrap_socket(raw, server_hostname="localhost"))
            half.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
        assert ask("POST", "/predict", tiny.png((255, 0, 0)), {"Content-Type": "image/png"})[0] == 200
        assert server.metrics.in_flight == 0  # none of the halves came as far as the server
