"""The application in this process, and the same behind a real socket."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed: pip install 'cdl-edge[serve]'")
pytest.importorskip("python_multipart", reason="the server's packages are not installed: pip install 'cdl-edge[serve]'")

from cdl_edge.decoders import Decoders
from cdl_edge.log import told
from cdl_edge.server import listen as listen_on
from cdl_edge.server.app import build_app
from cdl_edge.server.live_model import LiveModel
from cdl_edge.server.server import Server

TOKEN = "0123456789abcdef-of-the-tests"
DEFAULTS: dict[str, Any] = {"name": "tiny", "token": TOKEN, "allow_unsigned": True}


@pytest.fixture
def admin() -> dict[str, str]:
    """The header that lets a request change the bundle."""
    return {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that are logged meanwhile, by any thread."""
    lines: list[str] = []
    with told(lines.append, threads=True):
        yield lines


@pytest.fixture(scope="session")
def decoders() -> Iterator[Decoders]:
    """Processes that all tests share: each takes a while to start."""
    made = Decoders()
    yield made
    made.close()


@pytest.fixture
def make_server(make_version: Callable[..., Path], decoders: Decoders) -> Iterator[Callable[..., Server]]:
    """make(bundle=version 0, queue=..., token=..., ...) -> Server; its live model is closed at the end.

    It knows TOKEN and takes packs without a signature.
    """
    made = []

    def make(bundle: Path | None = None, **options: Any) -> Server:
        own = {k: options.pop(k) for k in ("queue", "runners", "limit_s", "load_s", "backend") if k in options}
        path = bundle or make_version(0)
        server = Server(LiveModel(path, threads=1, **own), path, **{**DEFAULTS, "decoders": decoders, **options})
        made.append(server)
        return server

    yield make
    for server in made:
        server.live.close(5)


@pytest.fixture
def make_client() -> Iterator[Callable[..., Any]]:
    """make(server, peer="127.0.0.1", host="localhost") -> starlette's TestClient."""
    testclient = pytest.importorskip("starlette.testclient", exc_type=RuntimeError, reason="httpx2 is not installed")
    with contextlib.ExitStack() as stack:

        def make(server: Server, peer: str = "127.0.0.1", host: str = "localhost:8000", **options: Any) -> Any:
            app = build_app(server, **options)
            client = testclient.TestClient(app, f"http://{host}", client=(peer, 5000), raise_server_exceptions=False)
            return stack.enter_context(client)

        yield make


@pytest.fixture
def client(make_server: Callable[..., Server], make_client: Callable[..., Any]) -> Any:
    """A client on this machine of a server of version 0."""
    return make_client(make_server())


@pytest.fixture
def listen() -> Iterator[Callable[..., int]]:
    """listen(server, bounds=Bounds(...)) -> port where uvicorn serves it, in a thread."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'cdl-edge[serve]'")
    from cdl_edge.server.guard import Bounds, Guard

    running = []

    def start(server: Server, bounds: Bounds | None = None, also: tuple[Any, ...] = (), **options: Any) -> int:
        listening = listen_on("127.0.0.1", 0)
        guard = Guard(server.metrics, bounds or Bounds())
        config = uvicorn.Config(
            build_app(server, **options), http=guard.protocol(), ws="none", log_level="critical", proxy_headers=False
        )
        process = uvicorn.Server(config)
        thread = threading.Thread(target=process.run, kwargs={"sockets": [listening, *also]})
        thread.start()
        running.append((process, thread))
        while not process.started:
            time.sleep(0.01)
        return int(listening.getsockname()[1])

    yield start
    for process, thread in running:
        process.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def pack_between(make_version: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """pack(0, 1) -> file that turns version 0 into version 1."""
    from cdl_edge.updates.packs import create

    def make(old: int, new: int, salt: int = 0) -> Path:
        out = tmp_path / f"{old}-{new}-{salt}.pack"
        create(make_version(old, salt=salt), make_version(new, salt=salt), out)
        return out

    return make
