"""The server: a bundle over HTTP, and a page to look at it. starlette, uvicorn and python-multipart: extra `serve`.

Importing this package loads none of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..extras import command
from ..log import LOG, told

__all__ = ["serve"]

GRACE_S = 30
"how long a stop waits for what is being answered"


def serve(
    bundle: Path | str,
    host: str = "127.0.0.1",
    port: int = 8000,
    backend: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    queue: int = 32,
    runners: int = 1,
    watch: bool = False,
    token: str | None = None,
    token_file: Path | None = None,
    public_key: Path | None = None,
    allow_unsigned: bool = False,
    socket_path: Path | None = None,
    limit_s: float = 10.0,
    collect: Path | None = None,
    name: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those that are in and return.

    Args:
        port: 0 takes a free one; a line that `say` gets names it.
        backend, precision, threads: see `runtime.load`.
        queue, runners, limit_s: see `server.live_model.LiveModel`.
        name: of the model in the Open Inference Protocol; empty: the bundle's folder.
        watch: put in every version that appears at `bundle`, once it has proven itself.
        token: who has it may install packs; None: the one in token_file.
        token_file: holds the token, made there at the first start; None: `runtime.secret.default_file`.
        public_key, allow_unsigned: whose packs; see `server.admin`.
        collect: folder to keep pictures in that get no sure answer; None: none are kept, see `server.collect`.
        socket_path: of a Unix socket, through which this user may install packs without the token.
        say: gets the lines of all threads, for this process has one server.

    Raises: InputError when a package is missing, the bundle does not work, the key is none, or the address is taken.
    """
    uvicorn = installed()
    from ..runtime.secret import checked, default_file, kept
    from ..updates.signature import read_public_key
    from .app import build_app
    from .collect import Collection
    from .guard import Guard
    from .live_model import LiveModel
    from .server import Server

    if public_key is not None:
        read_public_key(public_key)  # or the first pack, months later, would be the first to tell
    file = token_file or default_file()
    secret, made = (kept(file)) if token is None else (checked(token), False)
    with told(say, threads=True), contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(host, port))
        sockets = [listening]
        if socket_path is not None:
            sockets.append(stack.enter_context(listen_locally(socket_path)))
        live = LiveModel(bundle, backend, threads, precision, runners, queue, limit_s)
        packs = {"token": secret, "public_key": public_key, "allow_unsigned": allow_unsigned}
        collection = Collection(collect) if collect is not None else None
        more = {"collection": collection, "name": name}
        server = Server(live, Path(bundle), **packs, **more)  # type: ignore[arg-type]
        if collection is not None:
            stack.callback(collection.close)
            LOG.info(f"pictures without a sure answer are kept in {collect}")
        stack.callback(server.decoders.close)
        server.decoders.start()
        config = uvicorn.Config(
            build_app(server, watch),
            http=Guard(server.metrics).protocol(),
            ws="none",
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        model = server.describe()
        address = f"[{host}]" if ":" in host else host
        LOG.info(
            f"{model['name']} {model['version']}: http://{address}:{listening.getsockname()[1]}/   "
            f"({model['runner']['backend']}, {model['runner']['precision']}, room for {live.capacity} calls)"
        )
        if token is None:
            LOG.info(f"token for packs: {secret if made else 'as before'}, kept in {file}")
        with _ends_well():
            uvicorn.Server(config).run(sockets=sockets)
        if not live.close(0):
            LOG.info("a call of the engine is stuck: leaving without it")
            sys.stdout.flush()
            stack.close()
            os._exit(1)  # Python would wait for its thread


@contextlib.contextmanager
def _ends_well() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done: to end as asked is no failure."""
    if threading.current_thread() is not threading.main_thread():  # where no signal comes
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def installed() -> Any:
    """uvicorn. Raises: InputError when it, or what an application of this package needs, is missing."""
    try:
        import anyio
        import httptools
        import python_multipart
        import starlette
        import uvicorn
    except ImportError as error:
        raise InputError(
            "the server's packages are not installed",
            got=str(error),
            expected=", ".join(("starlette", "uvicorn", "python-multipart", "httptools")),
            fix=command("serve"),
        ) from error
    del anyio, httptools, python_multipart, starlette
    return uvicorn


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections. Raises: InputError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on {host} port {port}", got=str(error), fix="name another --host or --port"
        ) from error
    # Connections inherit it. asyncio sets it only where it sees IPPROTO_TCP, which create_server leaves out, and an
    # answer's head and body, sent apart, then wait 40 ms for each other (Nagle and delayed acknowledgement).
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


@contextlib.contextmanager
def listen_locally(path: Path) -> Iterator[socket.socket]:
    """A Unix socket that only this user can open; its file goes at the end.

    Raises: InputError where something else lies there, or another server listens there.
    """
    problem = None
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            try:
                asking.connect(str(path))
                problem = "another server listens there"
            except ConnectionRefusedError:  # left over
                path.unlink()
            except OSError as error:
                problem = str(error)
    elif path.exists() or path.is_symlink():
        problem = "there is a file that is no socket"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            if problem is None:
                listening.bind(str(path))
        except OSError as error:
            problem = str(error)
        finally:
            os.umask(before)
        if problem is not None:
            raise InputError(f"{path}: cannot listen there", got=problem, fix="name another --socket")
        listening.listen(64)
        yield listening
        path.unlink(missing_ok=True)
    finally:
        listening.close()
