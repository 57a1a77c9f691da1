"""Keys, and registries on the loopback: a small one with faults to order, and Debian's docker-registry."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest


@pytest.fixture
def make_key(tmp_path: Path) -> Callable[[str], SimpleNamespace]:
    """make(name) -> private, public: PEM files; hex: the public key as packs name it."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    def make(name: str) -> SimpleNamespace:
        key = Ed25519PrivateKey.generate()
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        return SimpleNamespace(private=private, public=public, hex=key.public_key().public_bytes_raw().hex())

    return make


class SmallRegistry(ThreadingHTTPServer):
    """The part of the distribution API that packs need, in memory. What it does wrong is set by the test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, dict[str, bytes]] = {}
        self.seen: list[SimpleNamespace] = []
        "what was asked, in its order"
        self.login: str | None = None
        'what a request has to bring as "Authorization"'
        self.challenge = ""
        "with which it is refused"
        self.page = 2
        "tags in an answer"
        self.cut: dict[str, int] = {}
        "digest -> bytes after which the connection ends, once"
        self.content: dict[str, bytes] = {}
        "digest -> what is sent instead"
        self.answer: dict[str, tuple[int, dict[str, str], bytes]] = {}
        "path, or its end -> what is answered whatever is asked"

    @property
    def at(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request of SmallRegistry."""

    server: SmallRegistry
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_one(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(SimpleNamespace(method=self.command, path=parts.path, headers=dict(self.headers)))
        for path, (status, headers, content) in self.server.answer.items():
            if self.path.endswith(path):
                return self.reply(status, content, **headers)
        if self.server.login is not None and self.headers.get("Authorization") != self.server.login:
            return self.reply(401, WWW_Authenticate=self.server.challenge)
        name, kind, rest = self.split(parts.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        return getattr(self, f"on_{kind}")(name, rest, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = handle_one  # noqa: N815

    @staticmethod
    def split(path: str) -> tuple[str, str, str]:
        for kind in ("tags", "manifests", "blobs"):
            name, found, rest = path.removeprefix("/v2/").partition(f"/{kind}/")
            if found:
                return name, kind, rest
        raise AssertionError(path)

    def on_tags(self, name: str, rest: str, query: dict[str, str], body: bytes) -> None:
        if name not in self.server.manifests:
            return self.reply(404, b'{"errors": [{"code": "NAME_UNKNOWN"}]}')
        tags = [tag for tag in sorted(self.server.manifests[name]) if tag > query.get("last", "")]
        page = tags[: self.server.page]
        more = {"Link": f'</v2/{name}/tags/list?last={page[-1]}>; rel="next"'} if len(tags) > len(page) else {}
        return self.reply(200, json.dumps({"name": name, "tags": page}).encode(), **more)

    def on_manifests(self, name: str, tag: str, query: dict[str, str], body: bytes) -> None:
        tags = self.server.manifests.get(name, {})
        if self.command == "PUT":
            document = json.loads(body)
            assert {entry["digest"] for entry in (document["config"], *document["layers"])} <= set(self.server.blobs)
            self.server.manifests.setdefault(name, {})[tag] = body
            return self.reply(201)
        if tag not in tags:
            return self.reply(404)
        digest = f"sha256:{hashlib.sha256(tags[tag]).hexdigest()}"
        return self.reply(200, tags[tag], Docker_Content_Digest=digest)

    def on_blobs(self, name: str, rest: str, query: dict[str, str], body: bytes) -> None:
        if self.command == "POST":
            return self.reply(202, Location=f"/v2/{name}/blobs/uploads/1?state=x")
        if self.command == "PUT":
            assert rest == "uploads/1" and query["state"] == "x"
            assert query["digest"] == f"sha256:{hashlib.sha256(body).hexdigest()}"
            self.server.blobs[query["digest"]] = body
            return self.reply(201)
        if rest not in self.server.blobs:
            return self.reply(404)
        content = self.server.content.get(rest, self.server.blobs[rest])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        cut = self.server.cut.pop(rest, None) if self.command == "GET" else None
        if cut is None:
            return self.reply(206 if start else 200, content[start:], **headers)
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[start:cut])
        self.close_connection = True
        return None


@pytest.fixture
def make_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], SmallRegistry]]:
    """make() -> a SmallRegistry that runs; no login of the user who runs the tests is seen."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("CDL_EDGE_REGISTRY_TOKEN", raising=False)
    running: list[SmallRegistry] = []

    def make() -> SmallRegistry:
        running.append(SmallRegistry())
        threading.Thread(target=running[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return running[-1]

    yield make
    for server in running:
        server.shutdown()
        server.server_close()


def logged_in(user: str, password: str) -> str:
    """What Basic sends, and what a file of `docker login` holds."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def debian_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """HOST:PORT of Debian's docker-registry in a process of its own."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no docker-registry here: apt-get install docker-registry")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    config = {"version": 0.1, "storage": storage, "http": {"addr": at}, "log": {"level": "error"}}
    (tmp_path / "registry.yml").write_text(json.dumps(config))  # YAML holds JSON
    with open(tmp_path / "registry.log", "wb") as log:
        process = subprocess.Popen([program, "serve", str(tmp_path / "registry.yml")], stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{at}/v2/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "registry.log").read_text()
                time.sleep(0.1)
        yield at
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["small", pytest.param("debian", marks=pytest.mark.slow)])
def at(request: pytest.FixtureRequest) -> str:
    """HOST:PORT of a registry: the small one, and in the whole suite a real one."""
    if request.param == "debian":
        return str(request.getfixturevalue("debian_registry"))
    return str(request.getfixturevalue("make_registry")().at)
